//! The flat map beside a former leaf that is folded in.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::layer::{self, CreateParameters, Image, Nothing, ParentLink};
use crate::sim::SimVfs;
use crate::sync::Mutex;
use crate::vfs::{Access, Vfs};
use crate::vhd::{Timestamp, UniqueId};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

const BLOCK: u64 = 64 << 10;
const SIZE: u64 = 4 * BLOCK;

/// A root of one value in all of its bytes, that says when it is asked and can be made to wait then.
#[derive(Debug)]
struct Root {
    value: u8,
    asked: Mutex<Sender<()>>,
    /// Ends the wait of one who asks; once the sender is gone nobody waits.
    go_on: Mutex<Receiver<()>>,
}

/// The other side of a [`Root`].
struct Keeper {
    asked: Receiver<()>,
    go_on: Sender<()>,
}

impl Source for Root {
    fn resolve(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, Found)) -> Result<()> {
        let _ = self.asked.lock().send(());
        let _ = self.go_on.lock().recv();
        visit(range.clone(), Found::File(range.start));
        Ok(())
    }

    fn read_file(&self, _at: u64, buf: &mut [u8]) -> Result<()> {
        buf.fill(self.value);
        Ok(())
    }
}

fn leaf() -> Arc<Layer> {
    let vfs: Arc<dyn Vfs> = Arc::new(SimVfs::new(1));
    let parent = ParentLink {
        unique_id: UniqueId([7; 16]),
        modified: Timestamp::from_unix_seconds(1 << 30),
        path: "parent.vhd".into(),
    };
    let path = Path::new("/leaf.vhd");
    let parameters = CreateParameters {
        size: SIZE,
        block_bytes: BLOCK as u32,
        ring_bytes: 512 << 10,
        parent: Some(parent),
    };
    layer::create(&*vfs, path, &parameters).unwrap();
    match layer::open(vfs, path, Access::ReadWrite, |_, _, _| Ok(())).unwrap().0 {
        Image::Dynamic(layer) => Arc::from(layer),
        Image::Fixed(_) => unreachable!(),
    }
}

fn read(parents: &Parents, offset: u64) -> u8 {
    let mut buf = [0; 1];
    parents.read(offset, &mut buf).unwrap();
    buf[0]
}

fn over_root() -> (Parents, Keeper) {
    let ((asked_sender, asked), (go_on, go_on_receiver)) = (channel(), channel());
    let root = Root { value: 1, asked: Mutex::new(asked_sender), go_on: Mutex::new(go_on_receiver) };
    (Parents::new(vec![Arc::new(root)], BLOCK as u32, SIZE), Keeper { asked, go_on })
}

/// Half of block 0, and all of block 1.
fn write_some(leaf: &Layer) {
    leaf.write_block(0, BLOCK / 2, &[2; BLOCK as usize / 2], &Nothing).unwrap();
    leaf.write_block(1, 0, &[2; BLOCK as usize], &Nothing).unwrap();
}

fn check(parents: &Parents) {
    let expected =
        [(0, 1), (BLOCK / 2 - 1, 1), (BLOCK / 2, 2), (BLOCK, 2), (2 * BLOCK - 1, 2), (2 * BLOCK, 1)];
    for (offset, value) in expected {
        assert_eq!(read(parents, offset), value, "byte {offset}");
    }
}

/// Pitfall 18: whoever began to look before a leaf was folded in, and is done after it, does not put back what was there before.
#[test]
fn a_slow_look_does_not_undo_a_fold() {
    let leaf = leaf();
    write_some(&leaf);
    let (parents, keeper) = over_root();
    let next = Parents::over(Some(&parents), &leaf);
    std::thread::scope(|scope| {
        let slow = [0, BLOCK].map(|offset| {
            scope.spawn({
                let parents = &parents;
                move || read(parents, offset)
            })
        });
        // One is inside the root, the other one there or on its way.
        keeper.asked.recv().unwrap();
        keeper.asked.recv().unwrap();
        next.fold(&leaf);
        drop(keeper.go_on);
        slow.into_iter()
            .for_each(|thread| assert_eq!(thread.join().unwrap(), 1, "it saw the chain as it was"));
    });
    check(&next);
}

/// Before, while and after a leaf is folded in, its parents show the same; what was known is not looked for again.
#[test]
fn a_fold_keeps_what_was_known() {
    let leaf = leaf();
    write_some(&leaf);
    let (parents, keeper) = over_root();
    drop(keeper.go_on);
    (0..3).for_each(|block| assert_eq!(read(&parents, block * BLOCK), 1));
    assert_eq!(keeper.asked.try_iter().count(), 3);
    let next = Parents::over(Some(&parents), &leaf);
    check(&next);
    next.fold(&leaf);
    check(&next);
    assert_eq!(keeper.asked.try_iter().count(), 0, "the root is not asked again");
    assert_eq!(next.flat.get(1).flat, Some(Flat::Whole(Place { source: 1, file_offset: place(&leaf, 1) })));
    let Some(Flat::Mixed(runs)) = next.flat.get(0).flat else { unreachable!() };
    assert_eq!(runs.len(), 2);
    check(&next.with_top(Arc::clone(&leaf) as Arc<dyn Source>));
}

fn place(leaf: &Layer, block: u32) -> u64 {
    leaf.place().data_offset(leaf.mapping(block).unwrap().slot().unwrap())
}
