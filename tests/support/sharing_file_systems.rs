//! Real file systems that share space, each in a file: for tests that are run by hand, as root, with btrfs-progs and xfsprogs.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::Command;

/// Runs `test` on a btrfs and an XFS of so many bytes each, with its name and where it is mounted.
pub fn on_each(bytes: u64, test: impl Fn(&str, &Path)) {
    for (kind, mkfs) in [("btrfs", "mkfs.btrfs"), ("xfs", "mkfs.xfs")] {
        let dir = tempfile::tempdir().unwrap();
        let (image, mounted) = (dir.path().join("image"), dir.path().join("mounted"));
        fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        fs::create_dir(&mounted).unwrap();
        let run = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().unwrap();
            assert!(output.status.success(), "{program}: {output:?}");
        };
        let [image, at] = [&image, &mounted].map(|path| path.to_str().unwrap());
        run(mkfs, &["-q", image]);
        run("mount", &["-t", kind, "-o", "loop", image, at]);
        let result = catch_unwind(AssertUnwindSafe(|| test(kind, &mounted)));
        run("umount", &[at]);
        result.unwrap_or_else(|panic| resume_unwind(panic));
    }
}
