//! A disk whose every operation the tests can hold up, fail and look at afterwards.

use cowvhd_export::{Backend, Errno, Extent, MemoryBackend};
use std::collections::{HashMap, HashSet};
use std::sync::{Condvar, Mutex, MutexGuard};

/// One call of the backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Read { offset: u64, length: u64 },
    Write { offset: u64, length: u64 },
    Flush,
    Zero { offset: u64, length: u64, punch: bool },
    Discard { offset: u64, length: u64 },
}

impl Call {
    fn offset(&self) -> u64 {
        match self {
            Call::Read { offset, .. }
            | Call::Write { offset, .. }
            | Call::Zero { offset, .. }
            | Call::Discard { offset, .. } => *offset,
            Call::Flush => FLUSH,
        }
    }
}

/// Stands for flushes where operations are named by their offset.
pub const FLUSH: u64 = u64::MAX;

/// Stands for writes alone at `offset`, where plain offsets name all operations there.
pub fn write_only(offset: u64) -> u64 {
    offset + 1
}

#[derive(Default)]
struct State {
    held: HashSet<u64>,
    waiting: HashMap<u64, usize>,
    failing: HashMap<u64, i32>,
    calls: Vec<Call>,
    /// Offsets of changes that completed since the last flush, and before it.
    volatile: Vec<u64>,
    durable: Vec<u64>,
}

pub struct TestDisk {
    memory: MemoryBackend,
    state: Mutex<State>,
    changed: Condvar,
}

impl TestDisk {
    pub fn new(size_bytes: u64) -> Self {
        Self::over(MemoryBackend::new(size_bytes))
    }

    pub fn over(memory: MemoryBackend) -> Self {
        TestDisk { memory, state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Holds up operations that start at `offset` until [`release`](Self::release).
    pub fn hold(&self, offset: u64) {
        self.state().held.insert(offset);
    }

    pub fn release(&self, offset: u64) {
        self.state().held.remove(&offset);
        self.changed.notify_all();
    }

    pub fn release_all(&self) {
        self.state().held.clear();
        self.changed.notify_all();
    }

    /// Waits until `count` operations at `offset` are held up.
    pub fn wait_held(&self, offset: u64, count: usize) {
        let mut state = self.state();
        while state.waiting.get(&offset).copied().unwrap_or(0) < count {
            state = self.changed.wait(state).unwrap();
        }
    }

    pub fn waiting(&self, offset: u64) -> usize {
        self.state().waiting.get(&offset).copied().unwrap_or(0)
    }

    /// Fails operations that start at `offset`.
    pub fn fail(&self, offset: u64, errno: i32) {
        self.state().failing.insert(offset, errno);
    }

    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }

    pub fn is_durable(&self, offset: u64) -> bool {
        self.state().durable.contains(&offset)
    }

    fn enter(&self, call: Call) -> Result<(), Errno> {
        let offset = call.offset();
        let mut names = vec![offset];
        if let Call::Write { .. } = call {
            names.push(write_only(offset));
        }
        let mut state = self.state();
        state.calls.push(call);
        for name in names {
            if state.held.contains(&name) {
                *state.waiting.entry(name).or_default() += 1;
                self.changed.notify_all();
                while state.held.contains(&name) {
                    state = self.changed.wait(state).unwrap();
                }
                *state.waiting.entry(name).or_default() -= 1;
            }
        }
        match state.failing.get(&offset) {
            Some(errno) => Err(Errno::new(*errno, "as a test")),
            None => Ok(()),
        }
    }

    fn changed(&self, offset: u64) {
        self.state().volatile.push(offset);
    }
}

impl Backend for TestDisk {
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }

    fn read_only(&self) -> bool {
        self.memory.read_only()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Errno> {
        self.enter(Call::Read { offset, length: buf.len() as u64 })?;
        self.memory.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), Errno> {
        self.enter(Call::Write { offset, length: buf.len() as u64 })?;
        self.memory.write_at(buf, offset)?;
        self.changed(offset);
        Ok(())
    }

    fn flush(&self) -> Result<(), Errno> {
        let covered = self.state().volatile.len();
        self.enter(Call::Flush)?;
        let mut state = self.state();
        let covered = covered.min(state.volatile.len());
        let flushed: Vec<u64> = state.volatile.drain(..covered).collect();
        state.durable.extend(flushed);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, punch: bool) -> Result<(), Errno> {
        self.enter(Call::Zero { offset, length, punch })?;
        self.memory.write_zeroes(offset, length, punch)?;
        self.changed(offset);
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.enter(Call::Discard { offset, length })?;
        self.memory.discard(offset, length)?;
        self.changed(offset);
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, Errno> {
        self.memory.extents(offset, length)
    }
}
