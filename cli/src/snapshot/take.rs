//! Taking a snapshot of open disks: the one way of the verb and of a server that is asked for it.

use crate::failure::Failure;
use cowvhd::Disk;
use cowvhd::snapshot::{Checkpoint, SnapshotName};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::str::FromStr;

/// A part of a VM's state, and the file that holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, file)) if !name.is_empty() && !file.is_empty() => {
                Ok(Part { name: name.into(), file: file.into() })
            }
            _ => Err("it has to be PART=FILE, such as ram=saved.bin".into()),
        }
    }
}

/// Takes a snapshot of these disks at one point, with these parts of the VM's state; the paths of the snapshots.
pub(crate) fn take(disks: &[&Disk], name: &SnapshotName, parts: &[Part]) -> Result<Vec<PathBuf>, Failure> {
    if let ([disk], []) = (disks, parts) {
        return Ok(vec![disk.snapshot(name)?]);
    }
    commit(Checkpoint::begin(disks, name)?, parts)
}

/// Gives a checkpoint these parts, and ends it.
pub(super) fn commit(checkpoint: Checkpoint<'_>, parts: &[Part]) -> Result<Vec<PathBuf>, Failure> {
    for part in parts {
        checkpoint.blob_from(&part.name, &part.file)?;
    }
    Ok(checkpoint.commit()?)
}
