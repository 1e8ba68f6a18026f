# What the debugger's tests look at: two harts in machine mode, then hart 0 in supervisor mode behind a page table.
# Each thing happens once or a known number of times. Labels that begin with at_ are for the tests; GDB does not get
# them, so that it names places by their functions.

        .attribute arch, "rv64gc"
        .equ    UART, 0x10000000
        .equ    FINISHER, 0x100000
        # Where the page table maps RAM to.
        .equ    HIGH, 0xffffffc000000000
        .equ    ROUNDS, 5

        .cfi_sections .debug_frame
        .text
        .globl  _start
        .type   _start, @function
_start:
        .cfi_startproc
        .cfi_undefined ra
        csrr    s0, mhartid
        la      sp, stacks
        addi    t0, s0, 1
        slli    t0, t0, 12
        add     sp, sp, t0
        bnez    s0, second
        call    main
        .cfi_endproc
        .size   _start, . - _start

        .globl  power_off
        .type   power_off, @function
power_off:
        .cfi_startproc
        li      t0, FINISHER
        li      t1, 0x5555
        sw      t1, 0(t0)
1:      j       1b
        .cfi_endproc
        .size   power_off, . - power_off

        .globl  main
        .type   main, @function
main:
        .cfi_startproc
        addi    sp, sp, -32
        .cfi_def_cfa_offset 32
        sd      ra, 24(sp)
        .cfi_offset ra, -8
        sd      s1, 16(sp)
        .cfi_offset s1, -16
        li      t0, 0x1234567
        csrw    mscratch, t0
        call    floats
        call    greet
        li      s1, 1
1:
        mv      a0, s1
        call    bump
        addi    s1, s1, 1
        li      t0, ROUNDS
        ble     s1, t0, 1b
        call    look
        la      t0, go
        li      t1, 1
        sd      t1, 0(t0)
2:
        la      t0, done
        ld      t1, 0(t0)
        beqz    t1, 2b
        call    descend
        ld      s1, 16(sp)
        .cfi_restore s1
        ld      ra, 24(sp)
        .cfi_restore ra
        addi    sp, sp, 32
        .cfi_def_cfa_offset 0
        ret
        .cfi_endproc
        .size   main, . - main

# 1.5 * 2.25, and 1 / 3, which is inexact.
        .globl  floats
        .type   floats, @function
floats:
        .cfi_startproc
        li      t0, 0x2000
        csrs    mstatus, t0
        la      t0, numbers
        fld     fa0, 0(t0)
        fld     fa1, 8(t0)
        fmul.d  fa2, fa0, fa1
        fld     fa4, 16(t0)
        fld     fa5, 24(t0)
        fdiv.d  fa3, fa4, fa5
        flw     ft0, 32(t0)
at_floats_end:
        ret
        .cfi_endproc
        .size   floats, . - floats

        .globl  greet
        .type   greet, @function
greet:
        .cfi_startproc
        la      t0, greeting
        li      t1, UART
1:      lbu     t2, 0(t0)
        beqz    t2, 2f
        sb      t2, 0(t1)
        addi    t0, t0, 1
        j       1b
2:      ret
        .cfi_endproc
        .size   greet, . - greet

# total += a0, by way of another function.
        .globl  bump
        .type   bump, @function
bump:
        .cfi_startproc
        addi    sp, sp, -16
        .cfi_def_cfa_offset 16
        sd      ra, 8(sp)
        .cfi_offset ra, -8
        call    add_to_total
        ld      ra, 8(sp)
        .cfi_restore ra
        addi    sp, sp, 16
        .cfi_def_cfa_offset 0
        ret
        .cfi_endproc
        .size   bump, . - bump

        .globl  add_to_total
        .type   add_to_total, @function
add_to_total:
        .cfi_startproc
        la      t0, total
        ld      t1, 0(t0)
        add     t1, t1, a0
at_add_store:
        sd      t1, 0(t0)
        ret
        .cfi_endproc
        .size   add_to_total, . - add_to_total

        .globl  look
        .type   look, @function
look:
        .cfi_startproc
        la      t0, secret
at_look_load:
        ld      a0, 0(t0)
at_look_end:
        ret
        .cfi_endproc
        .size   look, . - look

        .globl  second
        .type   second, @function
second:
        .cfi_startproc
        .cfi_undefined ra
        la      t0, go
1:      ld      t1, 0(t0)
        beqz    t1, 1b
        la      t0, ticks
        li      t2, 0
2:
        addi    t2, t2, 1
at_tick_store:
        sw      t2, 0(t0)
        li      t3, 3
        bne     t2, t3, 2b
        la      t0, done
        li      t1, 1
        sd      t1, 0(t0)
at_rest:
        wfi
        j       at_rest
        .cfi_endproc
        .size   second, . - second

# Into supervisor mode with a page table, and back by a call.
        .globl  descend
        .type   descend, @function
descend:
        .cfi_startproc
        la      t0, 3f
        csrw    mtvec, t0
        li      t0, -1
        csrw    pmpaddr0, t0
        li      t0, 0x1f
        csrw    pmpcfg0, t0
        la      t0, table
        # A gigabyte of RAM at its high address: PPN of 0x80000000, flags D A X W R V.
        li      t1, 0x80000000 >> 2 | 0xcf
        li      t2, HIGH >> 30 & 0x1ff
        slli    t2, t2, 3
        add     t2, t2, t0
        sd      t1, 0(t2)
        srli    t0, t0, 12
        li      t1, 8 << 60
        or      t0, t0, t1
        csrw    satp, t0
        sfence.vma
        li      t0, 0x1800
        csrc    mstatus, t0
        li      t0, 0x800
        csrs    mstatus, t0
        li      t1, HIGH - 0x80000000
        la      t0, supervisor
        add     t0, t0, t1
        csrw    mepc, t0
        mret
        .align  2
3:
        ret
        .cfi_endproc
        .size   descend, . - descend

        .globl  supervisor
        .type   supervisor, @function
supervisor:
        .cfi_startproc
        .cfi_undefined ra
        li      t0, 0xfeed
        csrw    sscratch, t0
        la      t1, kernel_word
at_supervisor_store:
        sd      t0, 0(t1)
at_supervisor_end:
        ecall
        .cfi_endproc
        .size   supervisor, . - supervisor

        .section .rodata
        .balign 8
        .globl  numbers
numbers:
        .double 1.5, 2.25, 1.0, 3.0
        .float  0.5
greeting:
        .asciz  "hello from the past\n"

        .data
        .balign 8
        .globl  total, secret, go, done, ticks, kernel_word
        .macro  word name, value
        .type   \name, @object
        .size   \name, 8
\name:  .dword  \value
        .endm
        word    total, 0
        word    secret, 0x5ec2e7
        word    go, 0
        word    done, 0
        word    ticks, 0
        word    kernel_word, 0

        .bss
        .balign 4096
table:  .skip   4096
stacks: .skip   2 * 4096
