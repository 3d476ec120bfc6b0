//! The names of a simulated directory tree, and what is pending of them.
//!
//! Each operation on names is one change that the medium takes whole or not at all, and that waits for a sync of the
//! directory. Pending ones are independent: any of them may persist without the others, in any order. An operation over two
//! directories is one change in each.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Which file a name stands for.
pub(super) type Names = BTreeMap<PathBuf, usize>;

/// What some names of one directory stand for from now on; `None` takes the name away.
#[derive(Debug, Clone)]
pub(super) struct NameChange(Vec<(PathBuf, Option<usize>)>);

impl NameChange {
    pub(super) fn apply(&self, names: &mut Names) {
        for (path, file) in &self.0 {
            match file {
                Some(file) => names.insert(path.clone(), *file),
                None => names.remove(path),
            };
        }
    }

    fn is_in(&self, directory: &Path) -> bool {
        self.0.first().is_some_and(|(path, _)| parent(path) == directory)
    }
}

/// The names as callers see them, as the medium holds them, and what is between.
#[derive(Debug, Default)]
pub(super) struct NameTable {
    seen: Names,
    medium: Names,
    /// In the order of their numbers.
    pending: Vec<(u64, NameChange)>,
    last_number: u64,
}

impl NameTable {
    /// Names that the medium holds.
    pub(super) fn durable(names: Names) -> Self {
        NameTable { seen: names.clone(), medium: names, ..NameTable::default() }
    }

    pub(super) fn get(&self, path: &Path) -> Option<usize> {
        self.seen.get(path).copied()
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.seen.keys()
    }

    pub(super) fn medium(&self) -> &Names {
        &self.medium
    }

    pub(super) fn pending(&self) -> impl Iterator<Item = &NameChange> {
        self.pending.iter().map(|(_, change)| change)
    }

    pub(super) fn last_number(&self) -> u64 {
        self.last_number
    }

    /// The files that a power cut may leave a name.
    pub(super) fn reachable(&self) -> BTreeSet<usize> {
        let pending = self.pending().flat_map(|change| &change.0).filter_map(|(_, file)| *file);
        self.medium.values().copied().chain(pending).collect()
    }

    /// Makes one operation of what `names` stand for from now on.
    pub(super) fn change(&mut self, names: &[(&Path, Option<usize>)]) {
        let mut directories: Vec<(&Path, NameChange)> = Vec::new();
        for (path, file) in names {
            let name = (path.to_path_buf(), *file);
            match directories.iter_mut().find(|(directory, _)| *directory == parent(path)) {
                Some((_, change)) => change.0.push(name),
                None => directories.push((parent(path), NameChange(vec![name]))),
            }
        }
        for (_, change) in directories {
            change.apply(&mut self.seen);
            self.last_number += 1;
            self.pending.push((self.last_number, change));
        }
    }

    /// A sync of `directory` takes what is pending in it up to change `last`: onto the medium, or, where the sync failed, away
    /// for good.
    pub(super) fn complete(&mut self, directory: &Path, last: u64, kept: bool) {
        let (medium, pending) = (&mut self.medium, &mut self.pending);
        pending.retain(|(number, change)| {
            let taken = *number <= last && change.is_in(directory);
            if taken && kept {
                change.apply(medium);
            }
            !taken
        });
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}
