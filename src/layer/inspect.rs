//! An image looked at as it would be after recovery, without opening it: for the checker, which goes on where an open stops.

use super::headers::{Condition, Decision, Headers};
use super::open::{Foreign, Opening};
use super::overlay::Overlay;
use super::{recover, table};
use crate::error::{Error, Result};
use crate::ext::Placement;
use crate::journal::{BlockPage, Scan};
use crate::sync::Arc;
use crate::vfs::{File, FileExt, Vfs};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// The structures of an image, and what its journal makes of them.
#[derive(Debug)]
pub(crate) struct Inspection {
    pub(crate) headers: Headers,
    pub(crate) decision: Decision,
    pub(crate) place: Placement,
    /// The pages of the BAT after a replay.
    pub(crate) table: Vec<u8>,
    /// The block pages that a replay would write, by file offset.
    pub(crate) pages: BTreeMap<u64, BlockPage>,
    /// The slots into which live records of the journal put blocks: the file may still have to grow over them.
    pub(crate) allocated: HashSet<u32>,
    /// What a replay would write, guest data included.
    pub(crate) overlay: Overlay,
    /// Why the journal cannot be replayed; the rest is then as its whole entries leave it.
    pub(crate) journal: Option<Error>,
    /// What another program did to it.
    pub(crate) foreign: Foreign,
}

impl Inspection {
    /// Reads the table, and replays the journal in memory where there is one to replay. The file is not changed.
    pub(crate) fn new(
        vfs: Arc<dyn Vfs>,
        file: Arc<dyn File>,
        path: &Path,
        headers: Headers,
        decision: Decision,
        place: Placement,
    ) -> Result<Self> {
        let opening = Opening::from_parts(vfs, file, path, headers, decision, place)?;
        let mut journal = None;
        let mut replayed = None;
        if opening.decision.condition == Condition::Dirty {
            match recover::scan_ring(&opening).and_then(|scan| replayed_metadata(&opening, &scan)) {
                Ok(metadata) => replayed = Some(metadata),
                Err(error @ Error::Damaged { .. }) => {
                    journal = Some(error);
                    replayed = replay_with_gaps(&opening)?;
                }
                Err(error) => return Err(error),
            }
        }
        let Metadata { table, pages, allocated, mut overlay } = match replayed {
            Some(metadata) => metadata,
            None => Metadata {
                table: table::read_table(&*opening.file, path, &place)?,
                pages: BTreeMap::new(),
                allocated: HashSet::new(),
                overlay: Overlay::default(),
            },
        };
        opening.put_first_page(&mut overlay)?;
        let foreign = match opening.decision.condition {
            _ if opening.decision.superblock.is_none() => Foreign::Untouched,
            Condition::Clean => opening.foreign(&table::entries(&table, &place))?,
            _ => opening.foreign_blocks(&table::entries(&table, &place)),
        };
        let Opening { headers, decision, .. } = opening;
        Ok(Inspection { headers, decision, place, table, pages, allocated, overlay, journal, foreign })
    }

    /// Whether every block on the grid must have a block header.
    pub(crate) fn is_described(&self) -> bool {
        self.decision.superblock.is_some_and(|(superblock, _)| !superblock.foreign_blocks)
            && self.foreign != Foreign::StructureChanged
    }
}

/// What a replay makes of the metadata.
struct Metadata {
    table: Vec<u8>,
    pages: BTreeMap<u64, BlockPage>,
    allocated: HashSet<u32>,
    overlay: Overlay,
}

fn replayed_metadata(opening: &Opening, scan: &Scan) -> Result<Metadata> {
    let replay = recover::replay(opening, scan)?;
    let overlay = Overlay::new(&opening.place, &replay);
    let allocated = replay.allocated().collect();
    let (table, pages) = replay.into_metadata();
    Ok(Metadata { table, pages, allocated, overlay })
}

/// The same with the entries that are whole, if they make sense together.
fn replay_with_gaps(opening: &Opening) -> Result<Option<Metadata>> {
    let Some((superblock, _)) = opening.decision.superblock else { return Ok(None) };
    let mut ring = vec![0; superblock.ring_bytes as usize];
    opening
        .file
        .read_or_zero_at(&mut ring, superblock.ring_offset)
        .map_err(opening.io("reading the journal ring"))?;
    match replayed_metadata(opening, &Scan::with_gaps(ring, &superblock)) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error @ Error::Io { .. }) => Err(error),
        Err(_) => Ok(None),
    }
}
