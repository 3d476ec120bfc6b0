//! Every lock and atomic of the library, in one place, so that a schedule checker can stand in for them.

pub(crate) use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};
pub(crate) use std::sync::Arc;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
pub(crate) use std::thread::yield_now;
