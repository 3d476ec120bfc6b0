//! Verifying a disk: a check of all layers, in which all data of the sealed ones is read and compared with its CRCs, and VM states
//! with their digests.

use super::chain::{self, ChainReport};
use super::code::Code;
use super::data::{self, Coverage, Damage, Sealed};
use super::image::{self, Examined, Image};
use super::report::{Finding, Report};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::layer::lock;
use crate::state::{Digest, StateNames, VmState};
use crate::sync::Arc;
use crate::vfs::{Access, File, Vfs};
use crate::vhd::DiskType;
use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The result of verifying a disk.
#[derive(Debug, Clone)]
pub struct Verified {
    chain: ChainReport,
    coverage: Vec<Coverage>,
}

impl Verified {
    /// What was found in each layer, what a check finds included. Damaged data is [`Code::DataDamaged`], with its place in the
    /// file and on the disk.
    pub fn chain(&self) -> &ChainReport {
        &self.chain
    }

    /// How far the data of each layer was compared, in the order of [`ChainReport::layers`].
    pub fn coverage(&self) -> &[Coverage] {
        &self.coverage
    }
}

/// Checks the disk at `path` and all of its parents, reads all data of its sealed layers and compares it with the CRCs that belong
/// to their seals, by as many threads as the machine runs at once. VM states that belong to seals are read, too. Damaged data is
/// looked for in the parents. Nothing is changed; but with `seal` CRCs that are missing or damaged are written, durably, from the
/// data as it is now.
///
/// `progress` gets the bytes of the layer's data that are done, and all of them; when it breaks, verifying ends with
/// [`Error::Cancelled`]. Fails as [`check_chain`](super::check_chain) does; with `seal` also where a sealed file cannot be
/// written to.
pub fn verify(
    options: &OpenOptions,
    path: &Path,
    seal: bool,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Verified> {
    let mut coverage = Vec::new();
    // Of each layer its damage, and the size of its disk.
    let mut damaged: Vec<(Vec<Damage>, u64)> = Vec::new();
    let mut look = |report: &mut Report, file: &Arc<dyn File>, path: &Path, image: Option<&Image>| {
        if report.disk_type == Some(DiskType::Fixed) || image.is_some() {
            for damage in damaged.iter_mut().flat_map(|(damages, _)| damages) {
                if damage.intact_in.is_none() && damage.is_intact_in(&**file, image) {
                    damage.intact_in = Some(path.to_path_buf());
                }
            }
        }
        let (covered, damages) = layer(&options.vfs, report, &**file, path, image, seal, progress)?;
        coverage.push(covered);
        damaged.push((damages, report.virtual_size.unwrap_or(u64::MAX)));
        Ok(())
    };
    let mut chain = chain::walk(options, path, &mut look)?;
    for (report, (damages, size)) in chain.layers_mut().iter_mut().zip(&damaged) {
        damages.iter().for_each(|damage| report.push(damage.finding(*size)));
    }
    Ok(Verified { chain, coverage })
}

/// Writes the CRCs that the sealed image at `path` lacks, durably, with one thread: for whoever took a snapshot, and has something
/// better to do. Nothing is done where it has no room for any. `progress` as in [`verify`]. Damage that comes to light is not told.
pub fn write_crcs(
    vfs: Arc<dyn Vfs>,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Coverage> {
    let file =
        vfs.open(path, Access::ReadOnly).map_err(|error| Error::io(path, "opening the image", error))?;
    lock(&*file, path, Access::ReadOnly)?;
    let Examined { mut report, image } = image::examine(Arc::clone(&vfs), Arc::clone(&file), path)?;
    let sealed = image.as_ref().and_then(|image| Sealed::new(&vfs, &*file, path, image));
    match sealed {
        None => Ok(Coverage::default()),
        Some(sealed) => {
            Ok(sealed.with_one_thread().write_missing()?.compare(&mut report, progress)?.coverage)
        }
    }
}

/// Verifies one layer; what is found goes into its report, but for the damaged data.
fn layer(
    vfs: &Arc<dyn Vfs>,
    report: &mut Report,
    file: &dyn File,
    path: &Path,
    image: Option<&Image>,
    seal: bool,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(Coverage, Vec<Damage>)> {
    let Some(image) = image else {
        let unproven_bytes = report.virtual_size.unwrap_or(0);
        return Ok((Coverage { unproven_bytes, ..Coverage::default() }, Vec::new()));
    };
    let lineage = image.inspection.decision.lineage();
    if !lineage.manifest.as_bytes().is_empty() && lineage.is_sealed() {
        check_state(&**vfs, report, path, image);
    }
    let Some(sealed) = Sealed::new(vfs, file, path, image) else {
        let unproven_bytes = report.allocated_blocks * u64::from(image.place().block_bytes);
        if lineage.is_sealed() && unproven_bytes > 0 {
            let what = match data::room(image) {
                None => "there is no room for them in the file: a copy of it gets some when it is sealed",
                Some(_) => "the table is not the one that was sealed",
            };
            report.add(Code::CrcsMissing, "data CRCs", image.inspection.headers.file_bytes, what);
        }
        return Ok((Coverage { unproven_bytes, ..Coverage::default() }, Vec::new()));
    };
    let sealed = if seal { sealed.write_missing()? } else { sealed };
    let compared = sealed.compare(report, progress)?;
    report.count_more(Code::DataDamaged, compared.uncounted);
    if compared.coverage.unproven_bytes > 0 {
        let what = format!("there are none of {} bytes of data", compared.coverage.unproven_bytes);
        let offset = data::room(image).map_or(0, |crcs| crcs.offset);
        report.add(Code::CrcsMissing, "data CRCs", offset, what);
    }
    Ok((compared.coverage, compared.damages))
}

/// The VM state that belongs to the seal, against its digests.
fn check_state(vfs: &dyn Vfs, report: &mut Report, path: &Path, image: &Image) {
    let Some((superblock, _)) = image.inspection.decision.superblock else { return };
    let (lineage, disk_id) = (superblock.lineage, image.inspection.decision.footer.unique_id);
    let folder = path.parent().unwrap_or(Path::new(""));
    let state =
        StateNames::of_manifest(folder, OsStr::from_bytes(lineage.manifest.as_bytes())).and_then(|names| {
            VmState::open(vfs, &names, disk_id, lineage.seal_id.0, Digest(lineage.state_digest))
        });
    let mut find = |error: Error| {
        let (code, structure, what) = (Code::StateDamaged, "VM state", error.to_string());
        report.push(Finding { code, structure, offset: None, block: None, guest: None, what });
    };
    match state {
        Ok(state) => state.blobs().iter().filter_map(|blob| blob.verify().err()).for_each(find),
        Err(error) => find(error),
    }
}
