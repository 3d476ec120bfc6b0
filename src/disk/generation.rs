//! Which leaf a running disk writes to, and how that changes while others read and write.
//!
//! A *generation* is a leaf and what is below it. A thread holds the generation it works on by a lock of its own stripe, so that
//! threads do not fight for a cache line, and two such locks are all that a request costs:
//!
//! - *Changes* hold the stripe's lock for changes. Whoever puts a new leaf in takes these locks of all stripes: then no change is
//!   under way, and all that were before are committed (the freeze). No I/O happens while it holds them.
//! - *Reads* hold one of two locks of their stripe, by the parity of a count. The new generation is put under the other one before the
//!   count moves on. So reads under way finish on the old generation and keep nobody waiting but whoever wants it gone.
//!
//! From then on flushes wait until the new leaf's place in the chain is durable: what they are asked for is in a file that has
//! no name yet. If that fails, the new leaf is poisoned. Lock order: `turn`, then the stripes, then `latest`.

use crate::chain::{MAX_DEPTH, Parents, Source, too_deep};
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::layer::{Below, Layer, Nothing, ParentLink};
use crate::sync::{
    Arc, AtomicUsize, Condvar, FEWER_STRIPES, Mutex, MutexGuard, Ordering, RwLock, RwLockReadGuard,
    RwLockWriteGuard, thread_number, yield_now,
};

/// A leaf and what is below it.
#[derive(Debug)]
pub(super) struct Generation {
    pub(super) leaf: Arc<Layer>,
    /// Of a differencing disk.
    pub(super) parents: Option<Parents>,
}

impl Generation {
    /// What shows where the leaf holds nothing.
    pub(super) fn below(&self) -> &dyn Below {
        match &self.parents {
            Some(parents) => parents,
            None => &Nothing,
        }
    }
}

const STRIPES: usize = 32 / FEWER_STRIPES;

/// A generation, held for as long as the value lives.
pub(super) type Held<'a> = RwLockReadGuard<'a, Arc<Generation>>;

/// What the threads of one number hold; on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Stripe {
    changes: RwLock<Arc<Generation>>,
    reads: [RwLock<Arc<Generation>>; 2],
}

/// The generations of a running disk, of which one is current.
#[derive(Debug)]
pub(super) struct Generations {
    stripes: Box<[Stripe]>,
    /// Its parity says which lock a read takes.
    changes_of_generation: AtomicUsize,
    /// Held by whoever changes the leaf, and for the time of a close.
    turn: Mutex<()>,
    latest: Mutex<Latest>,
    settled: Condvar,
}

#[derive(Debug)]
struct Latest {
    generation: Arc<Generation>,
    /// Its leaf's place in the chain is not durable yet: flushes wait.
    pending: bool,
}

impl Generations {
    pub(super) fn new(first: Generation) -> Self {
        Self::with(first, false)
    }

    /// Generations of which the first one's leaf has no place in the chain yet. It ends with [`Generations::first_switch`].
    pub(super) fn awaited(first: Generation) -> Self {
        Self::with(first, true)
    }

    fn with(first: Generation, pending: bool) -> Self {
        let first = Arc::new(first);
        let lock = || RwLock::new(Arc::clone(&first));
        Generations {
            stripes: (0..STRIPES).map(|_| Stripe { changes: lock(), reads: [lock(), lock()] }).collect(),
            changes_of_generation: AtomicUsize::new(0),
            turn: Mutex::new(()),
            settled: Condvar::new(),
            latest: Mutex::new(Latest { generation: first, pending }),
        }
    }

    fn stripe(&self) -> &Stripe {
        &self.stripes[thread_number() % STRIPES]
    }

    /// The generation for a read.
    pub(super) fn for_reading(&self) -> Held<'_> {
        let stripe = self.stripe();
        loop {
            let count = self.changes_of_generation.load(Ordering::SeqCst);
            let held = stripe.reads[count % 2].read();
            // Otherwise what is held may be the lock that the next leaf is put under, and this read would keep it, and with it all
            // changes, waiting.
            if self.changes_of_generation.load(Ordering::SeqCst) == count
                || defect::active(Defect::ReadLockNotRechecked)
            {
                return held;
            }
        }
    }

    /// The generation for a change. Until the value is dropped the leaf stays what it is; so nothing that takes long, such as a
    /// sync, belongs between.
    pub(super) fn for_changing(&self) -> Held<'_> {
        self.stripe().changes.read()
    }

    /// The generation of this moment, which may be a former one in the next.
    pub(super) fn latest(&self) -> Arc<Generation> {
        Arc::clone(&self.latest.lock().generation)
    }

    /// The same once its leaf has its place in the chain, or cannot get it any more.
    pub(super) fn latest_settled(&self) -> Arc<Generation> {
        let mut latest = self.latest.lock();
        while latest.pending && !defect::active(Defect::FlushOfNamelessLeaf) {
            self.settled.wait(&mut latest);
        }
        Arc::clone(&latest.generation)
    }

    /// Closes the leaf; no other one comes in the meantime.
    pub(super) fn close(&self) -> Result<()> {
        let _turn = self.turn.lock();
        self.latest_settled().leaf.close()
    }

    /// Makes `child`, which holds nothing, the leaf; the old one becomes the topmost parent. Every change is in the old leaf if it
    /// returned before the call, and in the new one if it began after. Changes wait for a moment, in which nothing is synced or
    /// read; reads do not wait.
    ///
    /// On return nobody reads or changes the old leaf but through the new one's parents; flushes of the old leaf that were called
    /// before may still be under way. Flushes called from now on, and a close, wait for the end of the returned [`Switch`].
    pub(super) fn switch(&self, child: Box<Layer>) -> Result<Switch<'_>> {
        let switch = self.prepare(child)?.hold().switch();
        switch.drain();
        Ok(switch)
    }

    /// The switch to the first leaf ([`Generations::awaited`]) from what was no layer.
    pub(super) fn first_switch(&self) -> Switch<'_> {
        Switch { generations: self, turn: None, old: None, next: self.latest(), ended: false }
    }

    /// All of a [`Generations::switch`] that can be done before changes stop.
    pub(super) fn prepare(&self, child: Box<Layer>) -> Result<Ready<'_>> {
        let turn = self.turn.lock();
        let old = self.latest();
        check(&old, &child)?;
        let parents = Parents::over(old.parents.as_ref(), &old.leaf);
        let next = Arc::new(Generation { leaf: Arc::from(child), parents: Some(parents) });
        Ok(Ready { generations: self, turn, old: Arc::clone(&old.leaf), next })
    }

    /// No change is under way from here on, and all that were before are committed.
    fn freeze(&self) -> Vec<RwLockWriteGuard<'_, Arc<Generation>>> {
        self.stripes.iter().map(|stripe| stripe.changes.write()).collect()
    }

    /// New reads see `next` from here on.
    fn show(&self, next: &Arc<Generation>) {
        let count = self.changes_of_generation.load(Ordering::SeqCst).wrapping_add(1);
        for stripe in &self.stripes {
            *stripe.reads[count % 2].write() = Arc::clone(next);
        }
        self.changes_of_generation.store(count, Ordering::SeqCst);
    }

    /// Waits for reads of the generation before, which nothing holds after that.
    fn drain(&self, current: &Arc<Generation>) {
        let before = self.changes_of_generation.load(Ordering::SeqCst).wrapping_add(1);
        for stripe in &self.stripes {
            *stripe.reads[before % 2].write() = Arc::clone(current);
        }
    }

    /// The topmost parent, folded in, is read by way of `top` from now on. The leaf stays.
    fn replace_top_parent(&self, top: Arc<dyn Source>) {
        self.put_parents(|parents| parents.with_source(parents.depth().saturating_sub(1), top));
    }

    /// Parent `number`, from the bottom, is read by way of `source` from now on, which holds the same in the same places.
    pub(super) fn replace_parent(&self, number: usize, source: &Arc<dyn Source>) {
        let _turn = self.turn.lock();
        self.put_parents(|parents| parents.with_source(number, Arc::clone(source)));
    }

    /// The same for one that holds all that the one beneath it does: that is gone from now on.
    pub(super) fn absorb(&self, number: usize, source: &Arc<dyn Source>) {
        let _turn = self.turn.lock();
        self.put_parents(|parents| parents.absorbing(number, Arc::clone(source)));
    }

    /// Puts in other parents under the same leaf, which show the same. The caller holds `turn`.
    fn put_parents(&self, change: impl FnOnce(&Parents) -> Parents) {
        let generation = self.latest();
        let Some(parents) = &generation.parents else { return };
        self.put(Generation { leaf: Arc::clone(&generation.leaf), parents: Some(change(parents)) });
    }

    /// Runs `work` on the leaf at a moment at which no change is under way; false where it is not `leaf` any more.
    pub(super) fn while_frozen(&self, leaf: &Arc<Layer>, work: impl FnOnce(&Layer)) -> bool {
        let stripes = self.freeze();
        let is_leaf = stripes.first().is_some_and(|current| Arc::ptr_eq(&current.leaf, leaf));
        if is_leaf {
            work(leaf);
        }
        is_leaf
    }

    /// No change that began before the call is under way on return.
    pub(super) fn pass_changes(&self) {
        self.stripes.iter().for_each(|stripe| drop(stripe.changes.write()));
    }

    /// Names `parent` in the leaf, which is to be `leaf`, and takes all but the lowest `keep` parents from beneath it: with them or
    /// without, the disk shows the same. Without a parent none is kept. `None` where another leaf came in.
    pub(super) fn shorten(
        &self,
        leaf: &Arc<Layer>,
        keep: usize,
        parent: Option<&ParentLink>,
    ) -> Option<Result<()>> {
        let _turn = self.turn.lock();
        let old = self.latest_settled();
        let parents = old.parents.as_ref().filter(|_| Arc::ptr_eq(&old.leaf, leaf))?;
        if let Err(error) = leaf.repoint(parent) {
            return Some(Err(error));
        }
        let parents = parent.map(|_| parents.lowest(keep));
        self.put(Generation { leaf: Arc::clone(leaf), parents });
        Some(Ok(()))
    }

    /// Puts in a generation with the same leaf that shows the same.
    fn put(&self, next: Generation) {
        let next = Arc::new(next);
        for stripe in &self.stripes {
            *stripe.changes.write() = Arc::clone(&next);
        }
        self.show(&next);
        self.drain(&next);
        self.latest.lock().generation = next;
    }
}

/// Whether `child` may become the leaf over `old`.
fn check(old: &Generation, child: &Layer) -> Result<()> {
    let wrong = |why: &str| {
        Err(Error::Invalid {
            what: format!("{}: as the new leaf of an open disk {why}", child.path().display()),
        })
    };
    if old.leaf.is_read_only() || child.is_read_only() {
        return Err(Error::ReadOnly { path: old.leaf.path().to_path_buf() });
    }
    old.leaf.check_open()?;
    let depth = old.parents.as_ref().map_or(0, Parents::depth) + 1;
    if depth + 1 > MAX_DEPTH {
        return Err(too_deep(old.leaf.path()));
    }
    if child.footer().current_size != old.leaf.footer().current_size {
        return wrong("it has another size");
    }
    if child.place().block_bytes != old.leaf.place().block_bytes {
        return wrong("it has blocks of another size");
    }
    Ok(())
}

/// A new leaf that is about to become the leaf of a disk. Dropped, it does not.
#[derive(Debug)]
pub(crate) struct Ready<'a> {
    generations: &'a Generations,
    turn: MutexGuard<'a, ()>,
    old: Arc<Layer>,
    next: Arc<Generation>,
}

impl<'a> Ready<'a> {
    /// Stops changes: no change is under way on return, and all that were before are committed to the old leaf. They go on with
    /// [`Stopped::switch`], or when the value is dropped. Whoever holds several disks sees to it that nobody else does, for the
    /// same ones, in another order.
    pub(crate) fn hold(self) -> Stopped<'a> {
        let stripes = match defect::active(Defect::ChangesInTwoLeaves) {
            true => Vec::new(),
            false => self.generations.freeze(),
        };
        Stopped { stripes, ready: self }
    }
}

/// A disk whose changes wait until it has its new leaf. Where several of them are held before the first one goes on, they have it
/// at one point: a change that began after another one returned is not in an old leaf when that one is in a new one.
#[derive(Debug)]
pub(crate) struct Stopped<'a> {
    stripes: Vec<RwLockWriteGuard<'a, Arc<Generation>>>,
    ready: Ready<'a>,
}

impl<'a> Stopped<'a> {
    /// Puts the new leaf in, and lets changes go on. Reads of the old generation may be under way: see [`Switch::drain`].
    pub(crate) fn switch(self) -> Switch<'a> {
        let Stopped { mut stripes, ready: Ready { generations, turn, old, next } } = self;
        // The cut: a flush that comes from here on has to wait; one that came before needs the old leaf alone.
        *generations.latest.lock() = Latest { generation: Arc::clone(&next), pending: true };
        let (turn, old) = (Some(turn), Some(old));
        let switch = Switch { generations, turn, old, next: Arc::clone(&next), ended: false };
        generations.show(&next);
        stripes.iter_mut().for_each(|current| **current = Arc::clone(&next));
        if defect::active(Defect::ChangesInTwoLeaves) {
            for stripe in &generations.stripes {
                *stripe.changes.write() = Arc::clone(&next);
                yield_now();
            }
        }
        switch
    }
}

/// A new leaf that takes changes already and has no durable place in the chain. Ends with [`Switch::commit`]; anything else
/// stops the disk.
#[derive(Debug)]
#[must_use]
pub(crate) struct Switch<'a> {
    generations: &'a Generations,
    turn: Option<MutexGuard<'a, ()>>,
    /// The layer that was the leaf; a fixed disk is none.
    old: Option<Arc<Layer>>,
    next: Arc<Generation>,
    ended: bool,
}

impl Switch<'_> {
    /// Waits for reads of the old generation; changes go on.
    pub(crate) fn drain(&self) {
        self.generations.drain(&self.next);
    }

    /// The new leaf.
    pub(crate) fn leaf(&self) -> &Layer {
        &self.next.leaf
    }

    /// The new leaf's place in the chain is durable: flushes go on. `sealed` is the old leaf from now on, to be read in a way that
    /// takes less memory than an open layer; without, it stays as it is.
    pub(crate) fn commit(mut self, sealed: Option<Arc<dyn Source>>) {
        // First of all: flushes need nothing of the rest.
        self.end();
        let _turn = self.turn.take().unwrap_or_else(|| self.generations.turn.lock());
        if let (Some(old), Some(parents)) = (&self.old, &self.generations.latest().parents) {
            parents.fold(old);
        }
        if let Some(sealed) = sealed {
            self.generations.replace_top_parent(sealed);
        }
    }

    /// The new leaf has no place in the chain: what is in it is lost, so every waiting and later change, flush and close fails.
    pub(crate) fn fail(mut self, cause: &str) {
        self.poison(cause);
    }

    fn poison(&mut self, cause: &str) {
        self.generations.latest().leaf.poison(cause);
        self.end();
    }

    fn end(&mut self) {
        self.ended = true;
        self.generations.latest.lock().pending = false;
        self.generations.settled.notify_all();
    }
}

impl Drop for Switch<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.poison("a snapshot ended before it was complete");
        }
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests;
