//! The state of a virtual machine (its RAM, its devices) beside the snapshot of its disk that it was taken with.
//!
//! ```text
//! vm@NAME.vhd            the sealed layer; its seal holds the digest of the manifest
//!   └─ vm@NAME.vmstate   the manifest: all disks of the VM with their seals; all blobs with their lengths and digests
//!        └─ vm@NAME+BLOB.vmstate   the blobs: plain, sparse files
//! ```
//!
//! Each of these determines the next, so what belongs together can be told from what does not, whatever was copied, swapped or
//! restored. The blobs are ordinary files, for others to write into and to map.
//!
//! A [`Draft`] makes a state, a [`VmState`] gives it back.

mod digest;
mod draft;
mod map;
mod names;
mod restore;

pub use crate::ext::{Digest, Manifest, ManifestBlob, ManifestDisk};
pub use draft::{Blob, Draft};
pub use map::PrivateMap;
pub use names::StateNames;
pub use restore::{StateBlob, VmState};
pub(crate) use restore::{any_manifest, is_published, read_manifest};
