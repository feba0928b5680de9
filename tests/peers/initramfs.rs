//! The guest's initramfs: busybox, modules of the guest kernel, and one program as all of user space.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::backend::NO_BREAK;
use crate::process::Lab;

/// The folder in which `tests/peers/install` puts the guest kernel and its modules.
const KERNEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/peers/kernel");
/// The folder of the modules of User-mode Linux's package. It has a subfolder for each kernel version.
const UML_MODULES: &str = "/usr/lib/uml/modules";

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The kernel that unpacks an initramfs.
#[derive(Clone, Copy)]
pub(crate) enum Kernel {
    Pc,
    Uml,
}

impl Kernel {
    fn modules(self) -> PathBuf {
        match self {
            Kernel::Pc => Path::new(KERNEL).join("modules"),
            Kernel::Uml => {
                let versions = fs::read_dir(UML_MODULES).expect("User-mode Linux: run tests/peers/install");
                versions.map(|entry| entry.unwrap().path()).next().expect("the modules of one kernel")
            }
        }
    }
}

/// QEMU's arguments that boot the guest kernel with `initramfs` and `more` words on its command line.
pub(crate) fn boot(initramfs: &Path, more: &[&str]) -> String {
    let kernel = Path::new(KERNEL).join("vmlinuz");
    assert!(kernel.exists(), "no guest kernel: run tests/peers/install");
    // On a busy machine, emulated timer interrupts arrive too late for the kernel's check of them, and the kernel would
    // panic.
    let words = [&["console=ttyS0", "no_timer_check"], more].concat().join(NO_BREAK);
    format!("-kernel {} -initrd {} -append {words}", kernel.display(), initramfs.display())
}

/// Makes the initramfs. It loads `drivers`, runs `commands` and then the program made of
/// `tests/peers/guest/PROGRAM.rs`. The commands can start the programs in `others`, which have the same folder.
pub(crate) fn make_with(
    lab: &Lab,
    kernel: Kernel,
    drivers: &[&str],
    commands: &str,
    others: &[&str],
    program: &str,
) -> PathBuf {
    let mut archive = Archive::default();
    for folder in ["bin", "dev"] {
        archive.add(folder, DIRECTORY, (0, 0), &[]);
    }
    archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find_map(|path| fs::read(path).ok());
    archive.add("bin/busybox", PROGRAM, (0, 0), &busybox.expect("busybox: run tests/peers/install"));
    for program in others.iter().chain([&program]) {
        archive.add(program, PROGRAM, (0, 0), &fs::read(build(lab, program)).unwrap());
    }

    let mut init = String::from("#!/bin/busybox sh\nbusybox mount -t devtmpfs dev /dev\n");
    for (i, module) in modules(&kernel.modules(), drivers).into_iter().enumerate() {
        archive.add(&format!("{i}.ko"), PROGRAM, (0, 0), &module);
        init += &format!("busybox insmod /{i}.ko\n");
    }
    init += &format!("{commands}\nexec /{program}\n");
    archive.add("init", PROGRAM, (0, 0), init.as_bytes());

    let path = lab.file("initramfs");
    fs::write(&path, archive.finish()).unwrap();
    path
}

/// Makes the initramfs as [`make_with`] does, with one program.
pub(crate) fn make(lab: &Lab, kernel: Kernel, drivers: &[&str], commands: &str, program: &str) -> PathBuf {
    make_with(lab, kernel, drivers, commands, &[], program)
}

fn build(lab: &Lab, name: &str) -> PathBuf {
    let program = lab.file(name);
    let source = format!("{}/tests/peers/guest/{name}.rs", env!("CARGO_MANIFEST_DIR"));
    let built = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"])
        .arg(&program)
        .arg(source)
        .status()
        .unwrap();
    assert!(built.success(), "the guest's program {name} does not build");
    program
}

/// Returns the contents of the named modules and of those that they need, in the order in which they load.
fn modules(folder: &Path, names: &[&str]) -> Vec<Vec<u8>> {
    let dependencies = fs::read_to_string(folder.join("modules.dep")).unwrap();
    let mut ordered: Vec<&str> = Vec::new();
    for name in names {
        let is_named = |path: &str| path.rsplit('/').next().is_some_and(|file| file.split('.').next() == Some(name));
        // A module without a line is built into the kernel.
        let Some((module, needs)) =
            dependencies.lines().filter_map(|line| line.split_once(':')).find(|(path, _)| is_named(path))
        else {
            continue;
        };
        for path in needs.split_whitespace().rev().chain([module]) {
            if !ordered.contains(&path) {
                ordered.push(path);
            }
        }
    }
    ordered.iter().map(|path| read_module(&folder.join(path))).collect()
}

fn read_module(path: &Path) -> Vec<u8> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let unpacked = Command::new("xz").arg("-dc").arg(path).output().unwrap();
        assert!(unpacked.status.success(), "xz -dc {}", path.display());
        unpacked.stdout
    } else {
        fs::read(path).unwrap()
    }
}

/// A cpio archive in the "newc" format, which the kernel unpacks. It is made here because device nodes then need no
/// root.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.files += 1;
        let size = u32::try_from(contents.len()).unwrap();
        let name_size = u32::try_from(name.len() + 1).unwrap();
        let fields = [self.files, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.align();
        self.bytes.extend(contents);
        self.align();
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
