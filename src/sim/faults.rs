//! Which operation fails, and how.

/// How an operation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// With this errno.
    Error(i32),
    /// It transfers about half of what it was asked to.
    Short,
}

/// What a plan may be limited to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reads.
    Read,
    /// Plain writes.
    Write,
    /// Writes that are durable on return.
    DurableWrite,
    /// Syncs.
    Sync,
    /// Changes of a file's length.
    SetLength,
    /// Punched ranges.
    Punch,
    /// Creations, links, renames, exchanges and removals of names.
    Names,
    /// Syncs of a directory.
    SyncDirectory,
}

/// From which operation on, and for how many, what fails. Operations count from when the plan was set.
#[derive(Debug, Clone, Copy, Default)]
pub struct FaultPlan {
    fault: Option<Fault>,
    only: Option<Operation>,
    first: u64,
    last: u64,
    seen: u64,
    injected: u64,
}

const ENOSPC: i32 = 28;

impl FaultPlan {
    /// The operation number `first` (from 0) fails, and `count - 1` after it.
    pub fn new(fault: Fault, first: u64, count: u64) -> Self {
        FaultPlan { fault: Some(fault), first, last: first.saturating_add(count), ..FaultPlan::default() }
    }

    /// The same, counting operations of one kind alone.
    pub fn only(self, operation: Operation) -> Self {
        FaultPlan { only: Some(operation), ..self }
    }

    /// The fault of the next operation, if it has one. A lack of space only meets operations that need some.
    pub(super) fn next(&mut self, operation: Operation) -> Option<Fault> {
        if self.only.is_some_and(|only| only != operation) {
            return None;
        }
        let may_run_out_of_space = !matches!(operation, Operation::Read | Operation::Punch);
        let number = self.seen;
        self.seen += 1;
        let fault = self.fault.filter(|_| (self.first..self.last).contains(&number))?;
        if fault == Fault::Error(ENOSPC) && !may_run_out_of_space {
            return None;
        }
        self.injected += 1;
        Some(fault)
    }

    pub(super) fn injected(&self) -> u64 {
        self.injected
    }

    pub(super) fn seen(&self) -> u64 {
        self.seen
    }
}
