//! A machine whose disk ignores flushes, for one command: a seccomp filter makes fsync, fdatasync and their kin return
//! success without doing anything, and a tracer takes the wish to be durable out of the writes that carry one. It works
//! on any server, also one that calls the kernel without libc, and needs no test code inside the server.

use std::io::{Error, Result as IoResult};
use std::os::unix::process::CommandExt;
use std::process::Command;

unsafe extern "C" {
    fn prctl(option: i32, ...) -> i32;
    fn ptrace(request: i32, ...) -> i64;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
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
const TRACE: u32 = 0x7ff0_0000;

// Numbers of x86_64.
const MSYNC: u32 = 26;
const FSYNC: u32 = 74;
const FDATASYNC: u32 = 75;
const SYNC: u32 = 162;
const SYNC_FILE_RANGE: u32 = 277;
const SYNCFS: u32 = 306;
const PWRITEV2: u32 = 328;

/// In struct seccomp_data: the number of the call, then the low half of its sixth argument.
const NUMBER: u32 = 0;
const SIXTH_ARGUMENT: u32 = 16 + 5 * 8;
const RWF_DSYNC_OR_SYNC: u32 = 2 | 4;

const PTRACE_TRACEME: i32 = 0;
const PTRACE_CONT: i32 = 7;
const PTRACE_GETREGS: i32 = 12;
const PTRACE_SETREGS: i32 = 13;
const PTRACE_SETOPTIONS: i32 = 0x4200;
/// New threads, the filter's TRACE, and the command dies with its tracer.
const OPTIONS: u64 = 0x08 | 0x80 | 0x0010_0000;
const EVENT_SECCOMP: i32 = 7;
const SIGTRAP: i32 = 5;
const SIGSTOP: i32 = 19;
const WALL: i32 = 0x4000_0000;

/// struct user_regs_struct, and the sixth argument (r9) in it.
type Registers = [u64; 27];
const SIXTH_REGISTER: usize = 8;

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
    let filter = filter();
    let mut command = Command::new(command);
    // SAFETY: between fork and exec it makes three system calls and touches only memory from before the fork.
    unsafe { command.args(args).pre_exec(move || confine(&filter)) };
    let child = command.spawn().map_err(|error| format!("starting under a filter: {error}"))?;
    trace(child.id() as i32).map_err(|error| format!("tracing: {error}"))
}

fn filter() -> Vec<Instruction> {
    let op = |code, if_true, if_false, k| Instruction { code, if_true, if_false, k };
    let mut filter = vec![op(LOAD_WORD, 0, 0, NUMBER)];
    for call in [FSYNC, FDATASYNC, SYNC, SYNC_FILE_RANGE, SYNCFS, MSYNC] {
        filter.push(op(JUMP_IF_EQUAL, 0, 1, call));
        filter.push(op(RETURN, 0, 0, RETURN_ERRNO));
    }
    filter.push(op(JUMP_IF_EQUAL, 0, 3, PWRITEV2));
    filter.push(op(LOAD_WORD, 0, 0, SIXTH_ARGUMENT));
    filter.push(op(JUMP_IF_ANY_BIT, 0, 1, RWF_DSYNC_OR_SYNC));
    filter.push(op(RETURN, 0, 0, TRACE));
    filter.push(op(RETURN, 0, 0, ALLOW));
    filter
}

fn confine(filter: &[Instruction]) -> IoResult<()> {
    let program = Program { length: filter.len() as u16, instructions: filter.as_ptr() };
    // SAFETY: the program and its instructions live through the calls, and are laid out as the kernel wants them.
    let done = unsafe {
        ptrace(PTRACE_TRACEME, 0_u64, 0_u64, 0_u64) == 0
            && prctl(PR_SET_NO_NEW_PRIVS, 1_u64, 0_u64, 0_u64, 0_u64) == 0
            && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if done { Ok(()) } else { Err(Error::last_os_error()) }
}

/// Runs the command to its end.
fn trace(child: i32) -> IoResult<()> {
    // It stops of itself when it has become the command.
    wait(child)?;
    request(PTRACE_SETOPTIONS, child, OPTIONS)?;
    request(PTRACE_CONT, child, 0)?;
    loop {
        let (thread, status) = wait(-1)?;
        let stopped = status & 0xff == 0x7f;
        if !stopped {
            if thread == child {
                return Ok(());
            }
            continue;
        }
        let (signal, event) = ((status >> 8) & 0xff, status >> 16);
        if event == EVENT_SECCOMP {
            let mut registers: Registers = [0; 27];
            request(PTRACE_GETREGS, thread, registers.as_mut_ptr() as u64)?;
            registers[SIXTH_REGISTER] &= !u64::from(RWF_DSYNC_OR_SYNC);
            request(PTRACE_SETREGS, thread, registers.as_ptr() as u64)?;
        }
        // The tracer's own stops, and the one each new thread begins with, are no signals to the command.
        let delivered = if event != 0 || signal == SIGTRAP || signal == SIGSTOP { 0 } else { signal };
        request(PTRACE_CONT, thread, delivered as u64)?;
    }
}

fn wait(pid: i32) -> IoResult<(i32, i32)> {
    let mut status = 0;
    // SAFETY: the status lives through the call.
    match unsafe { waitpid(pid, &raw mut status, WALL) } {
        -1 => Err(Error::last_os_error()),
        pid => Ok((pid, status)),
    }
}

fn request(request: i32, thread: i32, data: u64) -> IoResult<()> {
    // SAFETY: the thread is ours and stopped; the two requests that take memory get registers that live through the call.
    match unsafe { ptrace(request, thread as u64, 0_u64, data) } {
        -1 => Err(Error::last_os_error()),
        _ => Ok(()),
    }
}
