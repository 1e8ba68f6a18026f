// Entry, traps and the ways between the modes. With -DFIRMWARE it starts in M-mode and serves a small SBI to itself;
// without, in S-mode on whatever SBI there is.

#define STACK_SHIFT 13
#define FRAME 272            // x1 to x31, pc, status: see struct frame in guest.h

.macro save epc, status
    sd   x1, 0(sp)
    .irp n, 3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    sd   x\n, (\n - 1) * 8(sp)
    .endr
    csrr t0, \epc
    sd   t0, 248(sp)
    csrr t0, \status
    sd   t0, 256(sp)
.endm

.macro restore epc, status
    ld   t0, 248(sp)
    csrw \epc, t0
    ld   t0, 256(sp)
    csrw \status, t0
    ld   x1, 0(sp)
    .irp n, 3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ld   x\n, (\n - 1) * 8(sp)
    .endr
.endm

    .section .text.start, "ax"
    .globl _start
_start:
    // a0: hart, a1: device tree.
#ifdef FIRMWARE
    la   sp, machine_stacks
    addi t0, a0, 1
    slli t0, t0, STACK_SHIFT
    add  sp, sp, t0
    csrw mscratch, sp
    la   t0, machine_vector
    csrw mtvec, t0
    li   t0, 0x2000              // FS: initial
    csrs mstatus, t0
    call machine_main            // returns where the hart starts in S-mode, with a0 and a1 for it
    li   t0, 3 << 11
    csrc mstatus, t0
    li   t0, 1 << 11             // MPP: S
    csrs mstatus, t0
    mv   t1, a0
    csrr a0, mhartid
    csrw mepc, t1
    mret
#endif
    .globl supervisor_start
supervisor_start:
    la   sp, stacks
    addi t0, a0, 1
    slli t0, t0, STACK_SHIFT
    add  sp, sp, t0
    mv   tp, a0                  // the hart's number, for good
    csrw sscratch, zero          // zero in S-mode, the stack in U-mode
    la   t0, vector
    csrw stvec, t0
    li   t0, 0x2000
    csrs sstatus, t0
    bnez a0, 1f
    call main
1:  call worker
2:  wfi
    j    2b

    .align 2
vector:
    csrrw sp, sscratch, sp
    bnez sp, 1f
    csrr sp, sscratch            // from S-mode: stay on this stack
1:  addi sp, sp, -FRAME
    save sepc, sstatus
    csrrw t0, sscratch, zero     // the interrupted stack pointer
    sd   t0, 8(sp)
    ld   tp, saved_tp
    csrr t1, sstatus
    andi t1, t1, 1 << 8
    beqz t1, 2f
    ld   tp, 24(sp)              // S-mode's is good
2:  mv   a0, sp
    call supervisor_trap
    ld   t0, 256(sp)
    andi t0, t0, 1 << 8          // SPP: back to U-mode?
    bnez t0, 3f
    addi t0, sp, FRAME
    csrw sscratch, t0
3:  restore sepc, sstatus
    ld   sp, 8(sp)
    sret

    // void user_run(pc, sp): runs there in U-mode until it makes the call that ends it. On hart 0 alone.
    .globl user_run
user_run:
    addi sp, sp, -112
    sd   ra, 0(sp)
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11
    sd   s\n, (\n + 1) * 8(sp)
    .endr
    la   t0, user_sp
    sd   sp, 0(t0)
    la   t0, saved_tp
    sd   tp, 0(t0)
    csrw sscratch, sp
    csrw sepc, a0
    li   t0, 1 << 8
    csrc sstatus, t0
    mv   sp, a1
    sret
    .globl user_end
user_end:
    ld   sp, user_sp
    ld   ra, 0(sp)
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11
    ld   s\n, (\n + 1) * 8(sp)
    .endr
    addi sp, sp, 112
    csrsi sstatus, 2
    ret

#ifdef FIRMWARE
    .align 2
machine_vector:
    csrrw sp, mscratch, sp
    addi sp, sp, -FRAME
    save mepc, mstatus
    csrr t0, mscratch
    sd   t0, 8(sp)
    addi t0, sp, FRAME
    csrw mscratch, t0
    mv   a0, sp
    call machine_trap
    restore mepc, mstatus
    ld   sp, 8(sp)
    mret
#endif

    // Runs in U-mode, from wherever it is mapped: sums squares, touches its data page, traps, and ends.
    .section .user, "ax"
    .globl user_code
user_code:
    li   s0, 0
    li   s1, 200
1:  mul  t0, s1, s1
    add  s0, s0, t0
    amoadd.d zero, t0, (sp)
    addi s1, s1, -1
    bnez s1, 1b
    fcvt.d.l fa0, s0
    fsqrt.d fa0, fa0
    fcvt.l.d a1, fa0
    rdtime t0
    rdcycle t0
    rdinstret t0
    mv   a0, s0
    li   a7, 1                   // tell a0 and a1
    ecall
    .4byte 0xffffffff            // nobody's instruction
    ebreak
    csrr t0, sstatus             // not for U-mode
    ld   t0, (zero)              // nothing is there
    li   a7, 0                   // end
    ecall
