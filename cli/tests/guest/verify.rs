//! The checking half of the workload: after a crash, each sector holds what the last durable step to touch it wrote, or
//! what a later step wrote; never zeros, an older generation or somebody else's data.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::plan::{self, BLOCK, BLOCKS, SECTOR, Step};

/// Steps after the last one known to be durable that may have left traces. One or two would do; steps done over again
/// after an earlier crash leave what is there as it is.
const IN_FLIGHT: u64 = 64;

pub fn run(places: &[(&Path, u64)], durable: u64) -> Result<(), String> {
    for &(dir, seed) in places.iter().filter(|_| durable > 0) {
        let all = || {
            records(dir, seed, durable)?;
            blocks(dir, seed, durable)?;
            files(dir, seed, durable)
        };
        all().map_err(|what| format!("{}: {what}", dir.display()))?;
    }
    println!("\nverified {durable} .");
    Ok(())
}

fn records(dir: &Path, seed: u64, durable: u64) -> Result<(), String> {
    let found = fs::read(dir.join("records")).map_err(|error| format!("records: {error}"))?;
    let mut at = 0;
    for n in 1..=durable {
        let Step::Batch { records, .. } = plan::step(seed, n) else { continue };
        for record in records {
            let expected = record.bytes(seed, n);
            match found.get(at..at + expected.len()) {
                Some(bytes) if bytes == expected => at += expected.len(),
                Some(bytes) => {
                    return Err(format!(
                        "durable is step {durable}; records at byte {at}: expected {}, found {}",
                        label(&expected),
                        label(bytes)
                    ));
                }
                None => {
                    return Err(format!(
                        "durable is step {durable}; records end at byte {}, before {}",
                        found.len(),
                        label(&expected)
                    ));
                }
            }
        }
    }
    Ok(())
}

fn blocks(dir: &Path, seed: u64, durable: u64) -> Result<(), String> {
    let file = File::open(dir.join("blocks")).map_err(|error| format!("blocks: {error}"))?;
    // Of each block: the steps whose bytes may be there, None for zeros. The first is the durable one.
    let mut allowed: HashMap<u64, Vec<Option<u64>>> = HashMap::new();
    for n in 1..=durable + IN_FLIGHT {
        let Step::Batch { blocks, .. } = plan::step(seed, n) else { continue };
        for block in blocks {
            let steps = allowed.entry(block).or_insert_with(|| vec![None]);
            if n <= durable {
                steps.clear();
            }
            steps.push(Some(n));
        }
    }
    let untouched = vec![None];
    for block in 0..BLOCKS {
        let steps = allowed.get(&block).unwrap_or(&untouched);
        let mut found = [0; BLOCK];
        file.read_exact_at(&mut found, block * BLOCK as u64)
            .map_err(|error| format!("block {block}: {error}"))?;
        for (index, sector) in found.chunks(SECTOR).enumerate() {
            let is_of = |step: &Option<u64>| match step {
                Some(step) => sector == plan::block_sector(seed, block, *step, index),
                None => sector.iter().all(|&byte| byte == 0),
            };
            if !steps.iter().any(is_of) {
                return Err(format!(
                    "durable is step {durable}; block {block}.{index}: expected a step of {steps:?}, found {}",
                    label(sector)
                ));
            }
        }
    }
    Ok(())
}

fn files(dir: &Path, seed: u64, durable: u64) -> Result<(), String> {
    for n in 1..=durable {
        let Step::Create { sectors } = plan::step(seed, n) else { continue };
        let deleted_at = plan::deleted_at(n);
        let what = format!("durable is step {durable}; file of step {n} (deleted by step {deleted_at})");
        match fs::read(dir.join("files").join(n.to_string())) {
            Ok(_) if deleted_at <= durable => return Err(format!("{what} is back")),
            Ok(found) => {
                let expected = plan::file(seed, n, sectors);
                if found.len() != expected.len() {
                    return Err(format!("{what} has {} bytes for {}", found.len(), expected.len()));
                }
                let differs = |(found, expected): &(&[u8], &[u8])| found != expected;
                let mut pairs = found.chunks(SECTOR).zip(expected.chunks(SECTOR));
                if let Some((found, expected)) = pairs.find(differs) {
                    return Err(format!("{what}: expected {}, found {}", label(expected), label(found)));
                }
            }
            // Deleted, or its deletion was under way: that of a step or two later, not farther.
            Err(error) if error.kind() == ErrorKind::NotFound && deleted_at <= durable + 2 => {}
            Err(error) => return Err(format!("{what}: {error}")),
        }
    }
    Ok(())
}

/// How a sector or record says what it is, or a dump of its beginning.
fn label(bytes: &[u8]) -> String {
    if bytes.iter().all(|&byte| byte == 0) {
        return format!("{} zeros", bytes.len());
    }
    let start = &bytes[..bytes.len().min(48)];
    let line = start.split(|&byte| byte == b'\n').next().unwrap_or(start);
    format!("{:?}", String::from_utf8_lossy(line))
}
