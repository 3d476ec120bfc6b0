//! `cowvhd check`: what is wrong with an image, without changing it.

use crate::failure::Failure;
use crate::output;
use crate::parents::Parents;
use cowvhd::ErrorKind;
use cowvhd::check::{ChainReport, Code, Coverage, Finding, Report, Severity, Verified};
use cowvhd::vfs::HostVfs;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// The version of the JSON shape: it grows when a key changes its meaning or goes; new keys alone leave it.
pub(crate) const SCHEMA: u32 = 1;

/// Checks a disk file without changing it.
///
/// A file that was not closed is judged as recovery would leave it. Exit codes are those of fsck: 0 for an image in order
/// (notes and leaked space included), 4 for errors, 8 if it could not be checked, 16 for wrong usage.
#[derive(Debug, clap::Args)]
pub(crate) struct Check {
    /// The disk's file.
    file: PathBuf,
    /// Checks all of its parents, too, each against the one over it.
    #[arg(long)]
    chain: bool,
    #[command(flatten)]
    parents: Parents,
    /// Prints one JSON object; its keys are those of "qemu-img check", and more.
    #[arg(long)]
    json: bool,
    /// Leaked space counts as an error.
    #[arg(long)]
    strict: bool,
    /// Whose exit codes to use: "qemu" gives those of "qemu-img check" (0, 1, 2, 3, 63).
    #[arg(long, value_name = "STYLE", default_value = "fsck")]
    exit_code: ExitStyle,
}

/// Whose exit codes are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ExitStyle {
    Fsck,
    Qemu,
}

/// fsck's exit codes, with those of every other verb where both have one.
pub(crate) mod exit {
    pub(crate) const CLEAN: u8 = 0;
    pub(crate) const CORRECTED: u8 = 1;
    pub(crate) const ERRORS_LEFT: u8 = 4;
    pub(crate) const OPERATIONAL: u8 = 8;
}

impl Check {
    /// A check of one file, with fsck's exit codes.
    pub(crate) fn of(file: PathBuf) -> Self {
        let (chain, json, strict) = (false, false, false);
        Check { file, chain, parents: Parents::default(), json, strict, exit_code: ExitStyle::Fsck }
    }

    pub(crate) fn run(&self) -> ExitCode {
        if !self.chain && !self.parents.are_default() {
            output::say("--parent and --allow-parents-in need --chain");
            return crate::failure::Code::Usage.into();
        }
        let checked = match self.chain {
            true => cowvhd::check::check_chain(&self.parents.options(), &self.file).map(Checked::Chain),
            false => cowvhd::check::check(Arc::new(HostVfs), &self.file).map(Checked::File),
        };
        let checked = match checked {
            Ok(checked) => checked,
            Err(error) => return self.not_checked(error),
        };
        if let Err(failure) = checked.print(self.json) {
            output::say(failure);
            return self.code(exit::OPERATIONAL, 1);
        }
        let worst = checked.worst();
        let fsck = fsck_code(worst, self.strict);
        let qemu = match worst {
            Some(Severity::Corruption | Severity::Risk) => 2,
            Some(Severity::Leak) => 3,
            Some(Severity::Note) | None => 0,
        };
        self.code(fsck, qemu)
    }

    fn not_checked(&self, error: cowvhd::Error) -> ExitCode {
        let unsupported = error.kind() == ErrorKind::Unsupported;
        output::say(Failure::from(error));
        self.code(exit::OPERATIONAL, if unsupported { 63 } else { 1 })
    }

    fn code(&self, fsck: u8, qemu: u8) -> ExitCode {
        ExitCode::from(match self.exit_code {
            ExitStyle::Fsck => fsck,
            ExitStyle::Qemu => qemu,
        })
    }
}

/// What was checked.
pub(crate) enum Checked {
    File(Report),
    Chain(ChainReport),
    Data(Verified),
}

impl Checked {
    /// The disk itself first.
    fn layers(&self) -> &[Report] {
        match self {
            Checked::File(report) => std::slice::from_ref(report),
            Checked::Chain(chain) => chain.layers(),
            Checked::Data(verified) => verified.chain().layers(),
        }
    }

    fn chain(&self) -> Option<&ChainReport> {
        match self {
            Checked::File(_) => None,
            Checked::Chain(chain) => Some(chain),
            Checked::Data(verified) => Some(verified.chain()),
        }
    }

    /// How far the data of each layer was compared; nothing where it was not.
    fn coverage(&self) -> &[Coverage] {
        match self {
            Checked::Data(verified) => verified.coverage(),
            _ => &[],
        }
    }

    /// The worst severity found.
    pub(crate) fn worst(&self) -> Option<Severity> {
        self.layers().iter().filter_map(Report::worst).max()
    }

    /// Prints it for a person or a program.
    pub(crate) fn print(&self, as_json: bool) -> Result<(), Failure> {
        match as_json {
            true => json(self).and_then(|text| output::print(&text)),
            false => output::print(&text(self)),
        }
    }

    fn count(&self, severity: Severity) -> u64 {
        self.layers().iter().map(|layer| layer.count_severity(severity)).sum()
    }
}

/// The exit code for what was found.
pub(crate) fn fsck_code(worst: Option<Severity>, strict: bool) -> u8 {
    match worst {
        Some(Severity::Corruption | Severity::Risk) => exit::ERRORS_LEFT,
        Some(Severity::Leak) if strict => exit::ERRORS_LEFT,
        _ => exit::CLEAN,
    }
}

/// The report for a person.
fn text(checked: &Checked) -> String {
    let mut explained = BTreeSet::new();
    let mut text = String::new();
    let mut coverage = checked.coverage().iter();
    for layer in checked.layers() {
        text.push_str(&explain(layer, &mut explained));
        text.push_str(&summary(layer));
        if let Some(Coverage { compared_bytes, unproven_bytes, written_pages }) = coverage.next() {
            // Writing to a string cannot fail.
            let _ = write!(text, "  {compared_bytes} bytes of data proven, {unproven_bytes} not proven");
            let _ = match written_pages {
                0 => writeln!(text),
                pages => writeln!(text, ", {pages} pages of CRCs written"),
            };
        }
    }
    if let Some(chain) = checked.chain() {
        for parent in chain.parent_candidates() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "found nearby: {}", parent.display());
        }
        let layers = chain.layers().len();
        let path = chain.layers().first().map_or(String::new(), |leaf| name(&leaf.path));
        let _ = writeln!(
            text,
            "{path}: chain of {layers} {}: {}",
            if layers == 1 { "layer" } else { "layers" },
            counts(|severity| checked.count(severity))
        );
    }
    text
}

/// One line for each finding, and what they mean.
pub(crate) fn findings(report: &Report) -> String {
    explain(report, &mut BTreeSet::new())
}

/// The same; what a code means is said once.
fn explain(report: &Report, explained: &mut BTreeSet<Code>) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    for finding in report.findings() {
        let place = finding.offset.map(|offset| format!(" at offset {offset}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "{}: {}: {}{place}: {}",
            finding.severity(),
            finding.code,
            finding.structure,
            finding.what
        );
    }
    for (code, count) in report.codes() {
        let shown = report.findings().iter().filter(|finding| finding.code == code).count() as u64;
        if count > shown {
            let _ = writeln!(text, "{}: {code}: {} more", code.severity(), count - shown);
        }
        if code.severity() >= Severity::Leak && explained.insert(code) {
            let _ = writeln!(text, "  {code} means: {}\n  repair {}", code.means(), code.repair());
        }
    }
    text
}

/// The last line of a report.
pub(crate) fn summary(report: &Report) -> String {
    let kind = report.disk_type.map_or("no usable disk".to_string(), |kind| format!("{kind} disk"));
    let counts = counts(|severity| report.count_severity(severity));
    let blocks = match report.total_blocks {
        0 => String::new(),
        total => format!(", {} of {total} blocks in use", report.allocated_blocks),
    };
    format!("{}: {kind}{blocks}: {counts}\n", report.path.display())
}

/// How much of each severity there is, in words.
fn counts(count: impl Fn(Severity) -> u64) -> String {
    let counts: Vec<String> = [Severity::Corruption, Severity::Risk, Severity::Leak, Severity::Note]
        .map(|severity| (severity, count(severity)))
        .iter()
        .filter(|(_, count)| *count > 0)
        .map(|(severity, count)| format!("{count} {}", plural(*severity, *count)))
        .collect();
    if counts.is_empty() { "in order".to_string() } else { counts.join(", ") }
}

fn plural(severity: Severity, count: u64) -> String {
    match (severity, count) {
        (severity, 1) => severity.to_string(),
        (severity, _) => format!("{severity}s"),
    }
}

/// What is told about an image. Sizes and offsets are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonReport {
    schema: u32,
    filename: String,
    /// QEMU's name for VHD.
    format: &'static str,
    vhd_type: Option<String>,
    virtual_size: Option<u64>,
    file_size: u64,
    /// As in qemu-img: errors that kept the check from being complete; then there is no report at all.
    check_errors: u32,
    corruptions: u64,
    risks: u64,
    leaks: u64,
    notes: u64,
    leaked_bytes: u64,
    total_clusters: u64,
    allocated_clusters: u64,
    /// How often each code was found.
    codes: BTreeMap<&'static str, u64>,
    /// The first findings of each code.
    findings: Vec<JsonFinding>,
    #[serde(flatten)]
    chain: Option<JsonChain>,
}

/// What is told of a chain besides.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonChain {
    layers: Vec<JsonLayer>,
    parent_candidates: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonLayer {
    filename: String,
    vhd_type: Option<String>,
    virtual_size: Option<u64>,
    file_size: u64,
    corruptions: u64,
    risks: u64,
    leaks: u64,
    notes: u64,
    #[serde(flatten)]
    data: Option<JsonData>,
}

/// What is told of a layer's data.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonData {
    proven_bytes: u64,
    unproven_bytes: u64,
    crc_pages_written: u64,
}

impl From<&Coverage> for JsonData {
    fn from(coverage: &Coverage) -> Self {
        JsonData {
            proven_bytes: coverage.compared_bytes,
            unproven_bytes: coverage.unproven_bytes,
            crc_pages_written: coverage.written_pages,
        }
    }
}

impl From<&Report> for JsonLayer {
    fn from(layer: &Report) -> Self {
        JsonLayer {
            filename: name(&layer.path),
            vhd_type: layer.disk_type.map(|kind| kind.to_string()),
            virtual_size: layer.virtual_size,
            file_size: layer.file_bytes,
            corruptions: layer.count_severity(Severity::Corruption),
            risks: layer.count_severity(Severity::Risk),
            leaks: layer.count_severity(Severity::Leak),
            notes: layer.count_severity(Severity::Note),
            data: None,
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonFinding {
    filename: String,
    code: &'static str,
    severity: &'static str,
    structure: &'static str,
    offset: Option<u64>,
    block: Option<u32>,
    guest_offset: Option<u64>,
    guest_length: Option<u64>,
    what: String,
    means: &'static str,
    repair: &'static str,
}

impl JsonFinding {
    fn new(path: &Path, finding: &Finding) -> Self {
        JsonFinding {
            filename: name(path),
            code: finding.code.as_str(),
            severity: finding.severity().as_str(),
            structure: finding.structure,
            offset: finding.offset,
            block: finding.block,
            guest_offset: finding.guest.as_ref().map(|guest| guest.start),
            guest_length: finding.guest.as_ref().map(|guest| guest.end - guest.start),
            what: finding.what.clone(),
            means: finding.code.means(),
            repair: finding.code.repair(),
        }
    }
}

/// The report for a program.
fn json(checked: &Checked) -> Result<String, Failure> {
    let layers = checked.layers();
    let Some(report) = layers.first() else { return Err(Failure::new("nothing was checked")) };
    let mut codes = BTreeMap::new();
    for (code, count) in layers.iter().flat_map(Report::codes) {
        *codes.entry(code.as_str()).or_default() += count;
    }
    let findings = |layer: &Report| -> Vec<JsonFinding> {
        layer.findings().iter().map(|finding| JsonFinding::new(&layer.path, finding)).collect()
    };
    let mut coverage = checked.coverage().iter();
    let mut json_layer =
        |layer| JsonLayer { data: coverage.next().map(JsonData::from), ..JsonLayer::from(layer) };
    let chain = checked.chain().map(|chain| JsonChain {
        layers: layers.iter().map(&mut json_layer).collect(),
        parent_candidates: chain.parent_candidates().iter().map(|path| name(path)).collect(),
    });
    let json = JsonReport {
        schema: SCHEMA,
        filename: name(&report.path),
        format: "vpc",
        vhd_type: report.disk_type.map(|kind| kind.to_string()),
        virtual_size: report.virtual_size,
        file_size: report.file_bytes,
        check_errors: 0,
        corruptions: checked.count(Severity::Corruption),
        risks: checked.count(Severity::Risk),
        leaks: checked.count(Severity::Leak),
        notes: checked.count(Severity::Note),
        leaked_bytes: layers.iter().map(|layer| layer.leaked_bytes).sum(),
        total_clusters: report.total_blocks,
        allocated_clusters: report.allocated_blocks,
        codes,
        findings: layers.iter().flat_map(findings).collect(),
        chain,
    };
    output::json(&json)
}

fn name(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
