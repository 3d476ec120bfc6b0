//! What a check found. Bounded: of each code the first findings are kept, the others counted.

use super::code::{Code, Severity};
use crate::vhd::DiskType;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

/// So many findings of one code are kept.
const KEPT_PER_CODE: u64 = 50;
/// Of damaged data more: each is a place to look after.
const KEPT_OF_DATA: u64 = 1000;

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is about.
    pub code: Code,
    /// The structure it was found in, such as `"footer"` or `"block table"`.
    pub structure: &'static str,
    /// Where in the file, in bytes, if it has a place.
    pub offset: Option<u64>,
    /// The block it concerns, if it is one.
    pub block: Option<u32>,
    /// The bytes of the disk that it concerns, where that is known exactly.
    pub guest: Option<Range<u64>>,
    /// What was found there.
    pub what: String,
}

impl Finding {
    /// How bad it is.
    pub fn severity(&self) -> Severity {
        self.code.severity()
    }
}

/// The result of a check.
#[derive(Debug, Clone)]
pub struct Report {
    /// The file.
    pub path: PathBuf,
    /// Fixed, dynamic or differencing; `None` where nothing tells.
    pub disk_type: Option<DiskType>,
    /// Size of the disk in bytes, if it is known.
    pub virtual_size: Option<u64>,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Blocks that have a place in the file.
    pub allocated_blocks: u64,
    /// Blocks of the disk; 0 for a fixed disk.
    pub total_blocks: u64,
    /// Bytes of the medium that the file occupies and no block uses.
    pub leaked_bytes: u64,
    findings: Vec<Finding>,
    counts: BTreeMap<Code, u64>,
}

impl Report {
    pub(super) fn new(path: PathBuf, file_bytes: u64) -> Self {
        Report {
            path,
            disk_type: None,
            virtual_size: None,
            file_bytes,
            allocated_blocks: 0,
            total_blocks: 0,
            leaked_bytes: 0,
            findings: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    pub(super) fn add(&mut self, code: Code, structure: &'static str, offset: u64, what: impl Into<String>) {
        let what = what.into();
        self.push(Finding { code, structure, offset: Some(offset), block: None, guest: None, what });
    }

    /// The same for what has no place in the file.
    pub(super) fn note(&mut self, code: Code, structure: &'static str, what: String) {
        self.push(Finding { code, structure, offset: None, block: None, guest: None, what });
    }

    /// Forgets what was found of a code.
    pub(super) fn take_out(&mut self, code: Code) {
        self.counts.remove(&code);
        self.findings.retain(|finding| finding.code != code);
    }

    pub(super) fn push(&mut self, finding: Finding) {
        let count = self.counts.entry(finding.code).or_default();
        *count += 1;
        let kept = if finding.code == Code::DataDamaged { KEPT_OF_DATA } else { KEPT_PER_CODE };
        if *count <= kept {
            self.findings.push(finding);
        }
    }

    /// Counts findings that are not kept.
    pub(super) fn count_more(&mut self, code: Code, count: u64) {
        if count > 0 {
            *self.counts.entry(code).or_default() += count;
        }
    }

    /// Keeps no more than the first `limit` findings; all stay counted.
    pub(super) fn keep_findings(&mut self, limit: usize) {
        self.findings.truncate(limit);
    }

    /// What was found, in the order of the check. Of a code that was found often only the first are here; see
    /// [`Report::count`].
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// How often a code was found.
    pub fn count(&self, code: Code) -> u64 {
        self.counts.get(&code).copied().unwrap_or(0)
    }

    /// How many findings of this severity there are.
    pub fn count_severity(&self, severity: Severity) -> u64 {
        self.counts.iter().filter(|(code, _)| code.severity() == severity).map(|(_, count)| count).sum()
    }

    /// The codes found, each with how often.
    pub fn codes(&self) -> impl Iterator<Item = (Code, u64)> + '_ {
        self.counts.iter().map(|(&code, &count)| (code, count))
    }

    /// The worst severity found; `None` where there is nothing to say.
    pub fn worst(&self) -> Option<Severity> {
        self.counts.keys().map(|code| code.severity()).max()
    }

    /// Whether the image is in order: nothing worse than leaks was found.
    pub fn is_sound(&self) -> bool {
        self.worst() <= Some(Severity::Leak)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_counted_beyond_what_is_kept_and_taken_out_whole() {
        let mut report = Report::new(PathBuf::from("disk.vhd"), 512);
        for offset in 0..KEPT_PER_CODE + 2 {
            report.add(Code::Tail, "end of the file", offset, "1 byte");
        }
        report.note(Code::RevertUnfinished, "folder", "it is there".into());
        report.count_more(Code::DataDamaged, 0);
        assert_eq!(report.codes().count(), 2, "{report:?}");
        report.count_more(Code::Tail, 3);
        assert_eq!((report.count(Code::Tail), report.findings().len() as u64), (55, KEPT_PER_CODE + 1));
        report.take_out(Code::Tail);
        assert_eq!(report.count(Code::Tail), 0);
        assert!(matches!(report.findings(), [left] if left.code == Code::RevertUnfinished), "{report:?}");
    }
}
