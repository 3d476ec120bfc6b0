//! A machine whose disk ignores flushes, for one command: a seccomp filter makes fsync, fdatasync and their kin return
//! success without doing anything, and denies writes that ask to be durable by themselves. It works on any server,
//! also one that calls the kernel without libc, and needs no test code inside the server.

use std::io::Error;
use std::os::unix::process::CommandExt;
use std::process::Command;

unsafe extern "C" {
    fn prctl(option: i32, ...) -> i32;
}

const PR_SET_NO_NEW_PRIVS: i32 = 38;
const PR_SET_SECCOMP: i32 = 22;
const SECCOMP_MODE_FILTER: u64 = 2;

const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

const ALLOW: u32 = 0x7fff_0000;
/// With an error number of 0: the call is not made and returns 0.
const RETURN_ERRNO: u32 = 0x0005_0000;
const EOPNOTSUPP: u32 = 95;

// Numbers of x86_64.
const FSYNC: u32 = 74;
const FDATASYNC: u32 = 75;
const SYNC: u32 = 162;
const SYNC_FILE_RANGE: u32 = 277;
const SYNCFS: u32 = 306;
const MSYNC: u32 = 26;
const PWRITEV2: u32 = 328;

/// In struct seccomp_data: the number of the call, then the low half of its sixth argument.
const NUMBER: u32 = 0;
const SIXTH_ARGUMENT: u32 = 16 + 5 * 8;
const RWF_DSYNC_OR_SYNC: u32 = 2 | 4;

#[repr(C)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    k: u32,
}

#[repr(C)]
struct Program {
    length: u16,
    instructions: *const Instruction,
}

pub fn run(command: &str, args: &[&str]) -> Result<(), String> {
    let op = |code, if_true, if_false, k| Instruction { code, if_true, if_false, k };
    let ignored = [FSYNC, FDATASYNC, SYNC, SYNC_FILE_RANGE, SYNCFS, MSYNC];
    let mut filter = vec![op(LOAD_WORD, 0, 0, NUMBER)];
    for call in ignored {
        filter.push(op(JUMP_IF_EQUAL, 0, 1, call));
        filter.push(op(RETURN, 0, 0, RETURN_ERRNO));
    }
    filter.push(op(JUMP_IF_EQUAL, 0, 3, PWRITEV2));
    filter.push(op(LOAD_WORD, 0, 0, SIXTH_ARGUMENT));
    filter.push(op(JUMP_IF_ANY_BIT, 0, 1, RWF_DSYNC_OR_SYNC));
    filter.push(op(RETURN, 0, 0, RETURN_ERRNO | EOPNOTSUPP));
    filter.push(op(RETURN, 0, 0, ALLOW));

    let program = Program { length: filter.len() as u16, instructions: filter.as_ptr() };
    // SAFETY: the program and its instructions live through both calls, and are laid out as the kernel wants them.
    let installed = unsafe {
        prctl(PR_SET_NO_NEW_PRIVS, 1_u64, 0_u64, 0_u64, 0_u64) == 0
            && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if !installed {
        return Err(format!("seccomp: {}", Error::last_os_error()));
    }
    Err(format!("{command}: {}", Command::new(command).args(args).exec()))
}
