//! A Linux guest that boots in seconds: Debian's cloud kernel, and an initramfs of busybox, the modules for its disks,
//! e2fsprogs and our own program (`guest/tool.rs`). Its console is all that the tests see of it.
//!
//! Always under QEMU's own interpreter, tcg: it works on every machine, also within a virtual one.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::process::{Process, find, run, tool};

/// In the order they can be loaded.
const MODULES: [&str; 8] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
    "drivers/block/nbd",
];

/// A kernel and an initramfs, made in a directory of the test.
pub struct System {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl System {
    /// `programs` and `server_script` are for a server inside the guest.
    pub fn build(dir: &Path, programs: &[PathBuf], server_script: &str) -> Self {
        let kernel = Kernel::find();
        let root = dir.join("root");
        for module in MODULES {
            let name = Path::new(module).file_name().expect("a name").to_str().expect("plain");
            copy(&kernel.modules.join(format!("{module}.ko")), &root, &format!("modules/{name}.ko"));
        }
        let order = MODULES.map(|module| module.rsplit('/').next().expect("a name"));
        write(&root, "modules/order", (order.join("\n") + "\n").as_bytes());
        write(&root, "init", include_bytes!("../guest/init"));
        write(&root, "server", server_script.as_bytes());
        copy(&find("busybox"), &root, "bin/busybox");
        copy(&compiled_tool(), &root, "bin/tool");
        let own = [find("mkfs.ext4"), find("e2fsck"), "/etc/mke2fs.conf".into()];
        for program in own.iter().chain(programs) {
            copy_with_libraries(program, &root);
        }
        for dir in ["proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(root.join(dir)).expect("a directory");
        }
        let initramfs = dir.join("initramfs");
        let pack = "find . -print0 | cpio --quiet --null -o -H newc";
        let archive = fs::File::create(&initramfs).expect("the initramfs");
        find("cpio");
        let packed = tool("sh").args(["-ec", pack]).current_dir(&root).stdout(Stdio::from(archive)).status();
        assert!(packed.expect("sh").success(), "packing the initramfs");
        System { kernel: kernel.image, initramfs }
    }

    /// Boots with one disk and these parameters of `guest/init`.
    pub fn boot(&self, disk: &Disk, parameters: &str) -> Guest {
        Guest { console: Process::spawn(&self.machine(disk, parameters)) }
    }

    /// The same with a monitor that listens at `monitor` once the guest says something.
    pub fn boot_monitored(&self, disk: &Disk, parameters: &str, monitor: &Path) -> Guest {
        let mut qemu = self.machine(disk, parameters);
        qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        Guest { console: Process::spawn(&qemu) }
    }

    /// A machine like one that was booted, which goes on as it was saved in `state`.
    pub fn resume(&self, disk: &Disk, state: &Path) -> Guest {
        let mut qemu = self.machine(disk, "");
        qemu.args(["-global", "migration.mapped-ram=on"]);
        qemu.arg("-incoming").arg(format!("file:{}", state.display()));
        Guest { console: Process::spawn(&qemu) }
    }

    /// The same as [`System::boot_monitored`] with so many MiB of RAM, which are the file `ram`.
    pub fn boot_in_file(&self, disk: &Disk, parameters: &str, monitor: &Path, ram: (&Path, u64)) -> Guest {
        let mut qemu = self.machine_in_file(disk, parameters, ram, "on");
        qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        Guest { console: Process::spawn(&qemu) }
    }

    /// A machine like that with a private map of the RAM; its monitor has to be told what to go on with.
    pub fn await_in_file(&self, disk: &Disk, monitor: &Path, ram: (&Path, u64)) -> Guest {
        let mut qemu = self.machine_in_file(disk, "", ram, "off,readonly=on,rom=off");
        qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        qemu.args(["-incoming", "defer"]);
        Guest { console: Process::spawn(&qemu) }
    }

    fn machine_in_file(
        &self,
        disk: &Disk,
        parameters: &str,
        (ram, mib): (&Path, u64),
        share: &str,
    ) -> Command {
        let mut qemu = self.machine(disk, parameters);
        qemu.arg("-m").arg(mib.to_string());
        let object =
            format!("memory-backend-file,id=ram,size={mib}M,mem-path={},share={share}", ram.display());
        qemu.arg("-object").arg(object).args(["-machine", "memory-backend=ram"]);
        qemu
    }

    fn machine(&self, disk: &Disk, parameters: &str) -> Command {
        let mut qemu = tool("qemu-system-x86_64");
        qemu.args([
            "-accel",
            "tcg",
            "-M",
            "q35",
            "-cpu",
            "max",
            "-m",
            "384",
            "-nodefaults",
            "-display",
            "none",
        ]);
        qemu.args(["-serial", "stdio", "-no-reboot", "-kernel"]).arg(&self.kernel);
        qemu.arg("-initrd").arg(&self.initramfs);
        // A busy host emulates ticks too seldom for the kernel's test of the timer.
        qemu.args(["-append", &format!("console=ttyS0 quiet panic=-1 no_timer_check {parameters}")]);
        for (number, blockdev) in disk.blockdevs().into_iter().enumerate() {
            qemu.arg("-blockdev").arg(format!("{blockdev},node-name=disk{number},discard=unmap"));
            qemu.arg("-device").arg(format!("virtio-blk-pci,drive=disk{number}"));
        }
        qemu
    }
}

/// What the guest's disk is on the host.
pub enum Disk {
    /// Served over NBD on a Unix socket.
    Nbd(PathBuf),
    /// Two disks that are.
    TwoNbd([PathBuf; 2]),
    /// A raw file. QEMU passes every write on to the kernel at once, and the kernel outlives QEMU: what reached it when
    /// QEMU is killed, stays. So flushes need not be passed on to the host's own disk.
    Raw(PathBuf),
}

impl Disk {
    fn blockdevs(&self) -> Vec<String> {
        let nbd = |socket: &PathBuf| format!("driver=nbd,server.type=unix,server.path={}", socket.display());
        match self {
            Disk::Nbd(socket) => vec![nbd(socket)],
            Disk::TwoNbd(sockets) => sockets.iter().map(nbd).collect(),
            Disk::Raw(file) => vec![format!(
                "driver=raw,cache.no-flush=on,file.driver=file,file.filename={}",
                file.display()
            )],
        }
    }
}

/// A running guest.
pub struct Guest {
    console: Process,
}

impl Guest {
    /// Waits until the guest has found that all steps up to `durable` are there and intact.
    pub fn must_be_intact(&mut self, durable: u64) {
        if let Err(failed) = self.verdict(durable) {
            self.console.give_up(&format!("found damage: {failed}"));
        }
    }

    /// The same, or what the guest found wrong: a lost step, or a file system that cannot be mounted at all.
    pub fn verdict(&mut self, durable: u64) -> Result<(), String> {
        let line = format!("verified {durable} .");
        self.console.wait_for("a verdict", |seen| failure(seen).or_else(|| (seen == line).then_some(Ok(()))))
    }

    /// Waits until step `target` or a later one is durable.
    pub fn wait_until_durable(&mut self, target: u64) -> u64 {
        let reached = |seen: &str| durable_step(seen).filter(|&step| step >= target).map(Ok);
        match self.console.wait_for("getting that far", |seen| failure(seen).or_else(|| reached(seen))) {
            Ok(step) => step,
            Err(failed) => self.console.give_up(&format!("failed: {failed}")),
        }
    }

    /// SIGKILL to QEMU. Returns the last step that the guest had said to be durable, if any was not yet read.
    pub fn kill(&mut self) -> Option<u64> {
        self.console.kill().iter().rev().find_map(|line| durable_step(line))
    }

    /// Waits for the end of a guest that checks and powers off.
    pub fn checked(mut self) {
        let (status, lines) = self.console.rest();
        if !status.success() || !lines.iter().any(|line| line == "checked .") {
            self.console.give_up(&format!("ended with {status}"));
        }
    }
}

fn failure<T>(line: &str) -> Option<Result<T, String>> {
    line.starts_with("FAILED").then(|| Err(line.to_string()))
}

/// The full stop shows that the line is whole.
fn durable_step(line: &str) -> Option<u64> {
    line.strip_prefix("durable ")?.strip_suffix(" .")?.parse().ok()
}

struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The one that `scripts/install-test-tools` has unpacked into the target directory.
    fn find() -> Self {
        let root = cache().join("kernel");
        let images = fs::read_dir(root.join("boot")).into_iter().flatten().flatten();
        let mut names = images.filter_map(|entry| entry.file_name().into_string().ok());
        let name = names.find(|name| name.starts_with("vmlinuz-")).unwrap_or_else(|| {
            let target = root.ancestors().nth(2).unwrap_or(&root);
            panic!(
                "no kernel in {}: run CARGO_TARGET_DIR={} scripts/install-test-tools",
                root.display(),
                target.display()
            )
        });
        let version = name.trim_start_matches("vmlinuz-");
        Kernel {
            image: root.join("boot").join(&name),
            modules: root.join("lib/modules").join(version).join("kernel"),
        }
    }
}

/// `guest` in the target directory.
fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("guest")
}

/// The program that runs inside, compiled once for each state of its sources.
fn compiled_tool() -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest");
    let mut hasher = DefaultHasher::new();
    let entries = fs::read_dir(&sources).expect("the guest's sources").flatten();
    let files: BTreeSet<PathBuf> = entries.map(|entry| entry.path()).collect();
    for file in files {
        fs::read(&file).expect("a source").hash(&mut hasher);
    }
    let compiled = cache().join(format!("tool-{:016x}", hasher.finish()));
    if !compiled.exists() {
        fs::create_dir_all(cache()).expect("the cache");
        // Elsewhere first: other tests may be at the same.
        let dir = tempfile::tempdir_in(cache()).expect("a directory in the cache");
        let own = dir.path().join("tool");
        let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        rustc.args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols"]);
        // Named, because without a target such flags would hold for build scripts too.
        rustc.args(["--target", "x86_64-unknown-linux-gnu"]);
        run(rustc.arg(sources.join("tool.rs")).arg("-o").arg(&own));
        fs::rename(&own, &compiled).expect("renaming the guest's program");
    }
    compiled
}

fn write(root: &Path, name: &str, bytes: &[u8]) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
    fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("permissions");
}

fn copy(from: &Path, root: &Path, name: &str) {
    let bytes = fs::read(from)
        .unwrap_or_else(|error| panic!("{}: {error}: run scripts/install-test-tools", from.display()));
    write(root, name, &bytes);
}

/// Copies a file, and every library the loader would want, each to the place it has here.
fn copy_with_libraries(program: &Path, root: &Path) {
    let relative =
        |path: &Path| path.strip_prefix("/").expect("absolute").to_str().expect("plain").to_string();
    copy(program, root, &relative(program));
    // Fails for what is no program, or a static one.
    let listed = Command::new(find("ldd")).arg(program).output().expect("ldd");
    for word in
        String::from_utf8_lossy(&listed.stdout).split_whitespace().filter(|word| word.starts_with('/'))
    {
        let library = Path::new(word.trim_end_matches(':'));
        if library != program && !root.join(relative(library)).exists() {
            copy(library, root, &relative(library));
        }
    }
}
