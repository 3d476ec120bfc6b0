//! Every lock and atomic of the library, in one place, so that a schedule checker can stand in for them (feature
//! `schedules`).

#[cfg(feature = "schedules")]
mod scheduled;

#[cfg(feature = "schedules")]
pub(crate) use scheduled::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard,
    RwLockWriteGuard, scheduling_point, thread_number, yield_now,
};
#[cfg(not(feature = "schedules"))]
pub(crate) use {
    parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard},
    std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize},
    std::thread::yield_now,
};

pub(crate) use std::sync::atomic::Ordering;
pub(crate) use std::sync::{Arc, OnceLock};

/// For what all disks of a process share. A schedule checker knows one execution and its disks alone.
pub(crate) mod process_wide {
    pub(crate) use parking_lot::Mutex;
    pub(crate) use std::sync::atomic::AtomicUsize;
}

/// Divides how many counters or locks are shared by things that a hash tells apart: a schedule checker stops at each.
pub(crate) const FEWER_STRIPES: usize = if cfg!(feature = "schedules") { 16 } else { 1 };

/// Where another thread may run in the middle of an operation of the simulated medium. Threads of the system need no such place.
#[cfg(all(feature = "sim", not(feature = "schedules")))]
pub(crate) fn scheduling_point() {}

/// A small number of the calling thread, different from that of any other: spreads threads over stripes, so that they do not fight
/// for one cache line.
#[cfg(not(feature = "schedules"))]
pub(crate) fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}
