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

    fn blocks(&self, blocks: Range<u64>, _: u64, visit: &mut dyn FnMut(u64, u32)) -> Result<()> {
        blocks.for_each(|block| visit(block, 0));
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
        seal_id: Default::default(),
        fixed: Default::default(),
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
    check(&next.with_source(next.depth() - 1, Arc::clone(&leaf) as Arc<dyn Source>));
}

fn place(leaf: &Layer, block: u32) -> u64 {
    leaf.place().data_offset(leaf.mapping(block).unwrap().slot().unwrap())
}

/// A layer of units that are here, hidden or left to the layer below, as random numbers say. Where a unit is in its file tells
/// which one it is.
#[derive(Debug)]
struct Patches {
    number: u64,
    units: Vec<Found>,
}

const UNIT: u64 = 4096;
const UNITS_OF_BLOCK: u64 = BLOCK / UNIT;

impl Patches {
    fn new(number: u64) -> Self {
        let mut random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(number + 1);
        let mut below = |end: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % end
        };
        let mut units = vec![Found::Below; (SIZE / UNIT) as usize];
        for block in 0..SIZE / BLOCK {
            // Some blocks are not here at all, and few are here whole.
            let share = [0, 0, 2, 5, 40][below(5) as usize];
            for unit in block * UNITS_OF_BLOCK..(block + 1) * UNITS_OF_BLOCK {
                units[unit as usize] = match below(40) {
                    0 if share > 0 => Found::Zero,
                    value if value < share => Found::File(unit * UNIT + number),
                    _ => Found::Below,
                };
            }
        }
        Patches { number, units }
    }
}

impl Source for Patches {
    fn resolve(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, Found)) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / UNIT + 1) * UNIT);
            visit(
                at..end,
                match self.units[(at / UNIT) as usize] {
                    Found::File(_) => Found::File(at),
                    other => other,
                },
            );
            at = end;
        }
        Ok(())
    }

    fn blocks(&self, blocks: Range<u64>, _: u64, visit: &mut dyn FnMut(u64, u32)) -> Result<()> {
        for block in blocks.take_while(|block| *block < SIZE / BLOCK) {
            let units = (block * UNITS_OF_BLOCK) as usize..((block + 1) * UNITS_OF_BLOCK) as usize;
            if self.units[units].iter().any(|unit| *unit != Found::Below) {
                visit(block, self.number as u32);
            }
        }
        Ok(())
    }

    fn resolve_block(
        &self,
        range: Range<u64>,
        _: u64,
        entry: u32,
        visit: &mut dyn FnMut(Range<u64>, Found),
    ) -> Result<()> {
        assert_eq!(u64::from(entry), self.number);
        self.resolve(range, visit)
    }

    fn read_file(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        assert_eq!(self.units[(at / UNIT) as usize], Found::File(at / UNIT * UNIT + self.number));
        buf.fill(self.number as u8 + 1);
        Ok(())
    }
}

/// However many layers there are, what is beneath is what asking each of them for each unit says, in all kinds of ranges.
#[test]
fn layers_are_one_disk() {
    for depth in [1, 2, MANY as u64 - 1, MANY as u64, 40] {
        let layers: Vec<Arc<Patches>> = (0..depth).map(|number| Arc::new(Patches::new(number))).collect();
        let sources = layers.iter().map(|layer| Arc::clone(layer) as Arc<dyn Source>).collect();
        let parents = Parents::new(sources, BLOCK as u32, SIZE);
        let expected: Vec<u8> = (0..SIZE / UNIT)
            .map(|unit| {
                let decided = layers.iter().rev().map(|layer| (layer.number, layer.units[unit as usize]));
                match decided.into_iter().find(|(_, found)| *found != Found::Below) {
                    Some((number, Found::File(_))) => number as u8 + 1,
                    _ => 0,
                }
            })
            .collect();
        for _ in 0..2 {
            for length in [1, 512, UNIT, 3 * UNIT + 100, BLOCK + 7, SIZE] {
                for offset in (0..SIZE).step_by(5 * UNIT as usize + 300) {
                    let length = length.min(SIZE - offset);
                    let mut buf = vec![0xee; length as usize];
                    parents.read(offset, &mut buf).unwrap();
                    let right =
                        buf.iter().zip(offset..).all(|(byte, at)| *byte == expected[(at / UNIT) as usize]);
                    assert!(right, "{length} bytes at {offset} of {depth} layers");
                }
            }
        }
    }
}
