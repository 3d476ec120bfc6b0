//! The same chains as qcow2, read by QEMU: how its reads cost by depth, relative to its own depth of one.

use super::{GIB, KIB, Rng, SMALL};
use std::path::{Path, PathBuf};
use std::process::Command;

const SIZE: u64 = GIB;
const PIECE: u64 = 64 * KIB;
/// Reads of one figure.
pub const READS: u64 = 20_000;
/// Between a read and the next one, so that neighbours are of different pieces and all of the disk has its turn.
const STRIDE: u64 = 4099 * 16 * KIB + SMALL;

/// The layer that has `depth` layers beneath it and itself.
fn layer(folder: &Path, depth: u64) -> PathBuf {
    folder.join(format!("{depth}.qcow2"))
}

fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    if !output.status.success() {
        eprintln!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Makes a chain as deep as `depth`: a root that holds everything, and 1 % of it in scattered pieces in each layer above.
pub fn build(folder: &Path, depth: u64, rng: &mut Rng) -> Option<()> {
    for number in 1..=depth {
        let path = layer(folder, number);
        let (path, size) = (path.to_str()?, SIZE.to_string());
        let parent = layer(folder, number - 1);
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        if number > 1 {
            // Unchecked, as the chain is opened once for each layer otherwise.
            create.extend(["-u", "-F", "qcow2", "-b", parent.to_str()?]);
        }
        create.extend([path, &size]);
        run("qemu-img", &create)?;
        let mut commands = Vec::new();
        if number == 1 {
            commands.push(format!("write -q -P 2 0 {SIZE}"));
        } else {
            let piece = |_| format!("write -q -P 3 {} {PIECE}", rng.place(SIZE / PIECE, PIECE));
            commands.extend((0..SIZE / PIECE / 100).map(piece));
        }
        // Whole clusters: what is beneath is not needed.
        let image = format!(
            r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{path}"}},"backing":null}}"#
        );
        let mut write: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
        write.push(&image);
        run("qemu-io", &write)?;
    }
    Some(())
}

/// Seconds for random reads by one request at a time, after a run that warms up.
pub fn read(folder: &Path, depth: u64) -> Option<f64> {
    let (path, count, stride) = (layer(folder, depth), READS.to_string(), STRIDE.to_string());
    let bench =
        ["bench", "-f", "qcow2", "-d", "1", "-s", "4096", "-c", &count, "-S", &stride, path.to_str()?];
    let text = run("qemu-img", &bench)?;
    text.split_once("completed in ")?.1.split_whitespace().next()?.parse().ok()
}
