//! QEMU's name for our harts.

/// The extensions of our machine and no other, but for those that QEMU derives from them.
pub(crate) const CPU: &str = "rv64i,m=on,a=on,f=on,d=on,c=on,s=on,u=on,zicsr=on,zifencei=on,zicntr=on,zihpm=on,zihintpause=on,\
zba=on,zbb=on,zbc=on,zbs=on,zicond=on,zkn=on,zca=on,zcb=on,zcd=on,zfa=on,zawrs=on,zicbom=on,zicboz=on,zicbop=on,\
sstc=on,svinval=on,svnapot=on,svpbmt=on,svadu=on,svade=off,mmu=on,sv39=on,sv48=on,sv57=off,pmp=on,mvendorid=0,marchid=0,mimpid=0,\
priv_spec=v1.13.0";
