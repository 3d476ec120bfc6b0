//! `cowvhd repair`: the plan of a repair, the repair, and back again.

use crate::check::{SCHEMA, exit, findings, fsck_code, summary};
use crate::failure::Failure;
use crate::output;
use crate::parents::Parents;
use cowvhd::ErrorKind;
use cowvhd::check::{Consent, Repair as Repaired, Step, plan, relink, repair, salvage, undo};
use cowvhd::vfs::{HostVfs, Vfs};
use serde::Serialize;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Repairs a disk file, after saving every byte that it replaces.
///
/// Prints what is to be done. Without -n, -p or -y it asks, on a terminal; elsewhere it only prints. What is replaced is
/// saved first, in FILE.undo; "--undo-apply" restores it bit by bit. Exit codes are those of fsck: 0 for nothing to do, 1
/// if all was repaired, 4 if errors are left, 8 if it could not be done, 16 for wrong usage.
#[derive(Debug, clap::Args)]
pub(crate) struct Repair {
    /// The disk's file.
    file: PathBuf,
    /// Only prints what would be done.
    #[arg(short = 'n', group = "consent")]
    none: bool,
    /// Does what loses nothing, without asking.
    #[arg(short = 'p', group = "consent")]
    preen: bool,
    /// Does everything, without asking.
    #[arg(short = 'y', group = "consent")]
    yes: bool,
    /// Where to save what is replaced, instead of FILE.undo.
    #[arg(long, value_name = "UNDO", conflicts_with_all = ["none", "undo_apply"])]
    undo: Option<PathBuf>,
    /// Restores the file to what it was before the repair that wrote UNDO.
    #[arg(long, value_name = "UNDO", conflicts_with = "consent")]
    undo_apply: Option<PathBuf>,
    /// With --undo-apply: also if the file was changed after the repair.
    #[arg(long, requires = "undo_apply")]
    force: bool,
    /// Leaves the file alone and writes what can be read of it to the new image OUT; lists what is lost.
    #[arg(long, value_name = "OUT", conflicts_with_all = ["consent", "undo", "undo_apply", "json"])]
    salvage: Option<PathBuf>,
    /// Only looks for the parent of a differencing disk, where the disk does not name its place, and names the place found.
    #[arg(long, conflicts_with_all = ["undo_apply", "salvage", "json"])]
    relink: bool,
    #[command(flatten)]
    parents: Parents,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

/// What the user agrees to.
enum Agreed {
    Nothing,
    To(Consent),
}

impl Repair {
    /// A repair of one file, as far as is agreed to; without, it asks where it can.
    pub(crate) fn of(file: PathBuf, consent: Option<Consent>) -> Self {
        Repair {
            file,
            none: false,
            preen: consent == Some(Consent::Safe),
            yes: consent == Some(Consent::All),
            undo: None,
            undo_apply: None,
            force: false,
            salvage: None,
            relink: false,
            parents: Parents::default(),
            json: false,
        }
    }

    pub(crate) fn run(&self) -> ExitCode {
        if !self.relink && !self.parents.are_default() {
            output::say("--parent and --allow-parents-in need --relink");
            return crate::failure::Code::Usage.into();
        }
        let done = match (&self.undo_apply, &self.salvage) {
            _ if self.relink => self.relink(),
            (Some(saved), _) => self.go_back(saved),
            (_, Some(out)) => self.salvage(out),
            (None, None) => self.repair(),
        };
        ExitCode::from(done.unwrap_or_else(|failure| {
            output::say(failure);
            exit::OPERATIONAL
        }))
    }

    fn go_back(&self, saved: &Path) -> Result<u8, Failure> {
        undo(vfs(), saved, &self.file, self.force)?;
        output::print(&format!("{}: restored from {}\n", self.file.display(), saved.display()))?;
        Ok(exit::CLEAN)
    }

    fn salvage(&self, out: &Path) -> Result<u8, Failure> {
        let salvaged = salvage(vfs(), &self.file, out)?;
        let mut text = findings(&salvaged.before);
        // Writing to a string cannot fail.
        for Step { what, .. } in &salvaged.steps {
            let _ = writeln!(text, "mended in memory: {what}");
        }
        for range in &salvaged.lost {
            let _ = writeln!(
                text,
                "lost: {} bytes at offset {} of the disk",
                range.end - range.start,
                range.start
            );
        }
        if salvaged.journal_lost {
            text.push_str("lost: a part of the journal; writes may be missing that the guest had flushed\n");
        }
        let lost: u64 = salvaged.lost.iter().map(|range| range.end - range.start).sum();
        let _ = writeln!(text, "{}: {} bytes of data saved, {lost} lost", out.display(), salvaged.written);
        output::print(&text)?;
        let is_whole = salvaged.lost.is_empty() && !salvaged.journal_lost;
        Ok(if is_whole { exit::CLEAN } else { exit::ERRORS_LEFT })
    }

    fn repair(&self) -> Result<u8, Failure> {
        let agreed = match (self.preen, self.yes, self.none) {
            (true, _, _) => Agreed::To(Consent::Safe),
            (_, true, _) => Agreed::To(Consent::All),
            (_, _, true) => Agreed::Nothing,
            _ if io::stdin().is_terminal() && io::stdout().is_terminal() && !self.json => self.ask()?,
            _ => Agreed::Nothing,
        };
        match agreed {
            Agreed::Nothing => {
                let planned = plan(vfs(), &self.file, Consent::All)?;
                self.print(&planned, None)?;
                Ok(match planned.changes() {
                    true => fsck_code(planned.before.worst(), false),
                    false => fsck_code(planned.after.worst(), false),
                })
            }
            Agreed::To(consent) => {
                let (repaired, saved) = self.saving(|saved| repair(vfs(), &self.file, consent, saved))?;
                self.print(&repaired, Some(&saved))?;
                Ok(match (repaired.is_sound(), repaired.changes()) {
                    (false, _) => exit::ERRORS_LEFT,
                    (true, true) => exit::CORRECTED,
                    (true, false) => exit::CLEAN,
                })
            }
        }
    }

    fn relink(&self) -> Result<u8, Failure> {
        let (options, parent) = (self.parents.options(), self.parents.parent());
        let file = self.file.display();
        let name = |parent: &Path| format!("{file}: its parent is {}", parent.display());
        match relink(&options, &self.file, parent, None)? {
            None => output::print(&format!("{file}: its parent is where it says\n")).map(|()| exit::CLEAN),
            Some(found) if !(self.preen || self.yes) => {
                output::print(&format!("would do (-p): {}\n", name(&found))).map(|()| exit::ERRORS_LEFT)
            }
            Some(_) => {
                let (found, saved) =
                    self.saving(|saved| relink(&options, &self.file, parent, Some(saved)))?;
                let done = found.map(|found| name(&found)).unwrap_or_default();
                output::print(&format!("done (-p): {done}\nsaved in {}\n", saved.display()))?;
                Ok(exit::CORRECTED)
            }
        }
    }

    /// Does something with the first undo file that is free or unfinished.
    fn saving<T>(&self, repair: impl Fn(&Path) -> cowvhd::Result<T>) -> Result<(T, PathBuf), Failure> {
        let mut number = 1;
        loop {
            let saved = match (&self.undo, number) {
                (Some(path), _) => path.clone(),
                (None, 1) => with_suffix(&self.file, ".undo"),
                (None, _) => with_suffix(&self.file, &format!(".undo-{number}")),
            };
            match repair(&saved) {
                Err(error) if error.kind() == ErrorKind::Exists && self.undo.is_none() && number < 1000 => {
                    number += 1;
                }
                result => return Ok((result?, saved)),
            }
        }
    }

    fn ask(&self) -> Result<Agreed, Failure> {
        let planned = plan(vfs(), &self.file, Consent::All)?;
        if !planned.changes() {
            return Ok(Agreed::Nothing);
        }
        self.print(&planned, None)?;
        let safe = planned.steps.iter().all(|step| step.safe);
        let question = match safe {
            true => "Do this? [y]es, [n]o: ",
            false => "Do this? [y]es, only what loses nothing [p], [n]o: ",
        };
        output::print(question)?;
        let mut answer = String::new();
        io::stdin()
            .lock()
            .read_line(&mut answer)
            .map_err(|error| Failure::new(format!("cannot read the answer: {error}")))?;
        Ok(match answer.trim().to_ascii_lowercase().as_str() {
            "y" | "yes" => Agreed::To(Consent::All),
            "p" => Agreed::To(Consent::Safe),
            _ => Agreed::Nothing,
        })
    }

    fn print(&self, repaired: &Repaired, saved: Option<&Path>) -> Result<(), Failure> {
        let saved = saved.filter(|_| repaired.changes());
        if self.json {
            return output::print(&json(repaired, saved)?);
        }
        let mut text = findings(&repaired.before);
        let (done, then) = match saved {
            Some(_) => ("done", "afterwards"),
            None => ("would do", "then"),
        };
        // Writing to a string cannot fail.
        for Step { what, safe } in &repaired.steps {
            let _ = writeln!(text, "{done} ({}): {what}", if *safe { "-p" } else { "-y" });
        }
        if let Some(saved) = saved.filter(|saved| saved.exists()) {
            let _ = writeln!(text, "saved in {}", saved.display());
        }
        if repaired.changes() {
            let left = findings(&repaired.after);
            let _ = left.lines().try_for_each(|line| writeln!(text, "{then} left: {line}"));
        }
        text.push_str(&summary(&repaired.after));
        output::print(&text)
    }
}

fn vfs() -> Arc<dyn Vfs> {
    Arc::new(HostVfs)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// What is told about a repair.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonRepair {
    schema: u32,
    filename: String,
    /// Whether the file was changed.
    changed: bool,
    /// Whether nothing worse than leaks is left, or would be.
    sound: bool,
    /// Where what was replaced is saved.
    undo: Option<String>,
    steps: Vec<JsonStep>,
    /// How often each code was found before, and is found afterwards.
    before: Codes,
    after: Codes,
}

type Codes = std::collections::BTreeMap<&'static str, u64>;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonStep {
    what: String,
    safe: bool,
}

fn json(repaired: &Repaired, saved: Option<&Path>) -> Result<String, Failure> {
    let codes = |report: &cowvhd::check::Report| report.codes().map(|(c, n)| (c.as_str(), n)).collect();
    let json = JsonRepair {
        schema: SCHEMA,
        filename: repaired.before.path.to_string_lossy().into_owned(),
        changed: saved.is_some(),
        sound: repaired.is_sound(),
        undo: saved.filter(|saved| saved.exists()).map(|saved| saved.to_string_lossy().into_owned()),
        steps: repaired
            .steps
            .iter()
            .map(|step| JsonStep { what: step.what.clone(), safe: step.safe })
            .collect(),
        before: codes(&repaired.before),
        after: codes(&repaired.after),
    };
    output::json(&json)
}
