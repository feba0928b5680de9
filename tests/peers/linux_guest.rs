//! A Linux guest in QEMU whose disk is served by `backend blk`. It runs during migrations, and while its back-end is killed
//! and restarted, also during a migration (rule L15.2).

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::backend::{Backend, Kind, words};
use crate::initramfs::{self, Kernel};
use crate::migration::{self, GENTLE, NEVER_CONVERGES};
use crate::process::{Lab, Process, wait_for};
use crate::qemu::Qemu;

const DISK_BYTES: u64 = 64 << 20;
/// For each migration, true for several channels.
const MIGRATIONS: [bool; 4] = [false, true, false, true];
const DISK: &str = "-device vhost-user-blk-pci,chardev=vu,num-queues=1";

/// A QEMU that runs the guest or waits for it.
pub(crate) struct Host {
    pub(crate) qemu: Qemu,
    console: PathBuf,
}

impl Host {
    /// `device` is the front-end of the back-end at `socket`, whose chardev is `vu`.
    pub(crate) fn start(lab: &Lab, name: &str, boot: &str, socket: &Path, device: &str) -> Host {
        Host::start_with(lab, name, boot, socket, "reconnect-ms=100", device)
    }

    /// As [`start`](Host::start), with `how` as the options of the connection.
    fn start_with(lab: &Lab, name: &str, boot: &str, socket: &Path, how: &str, device: &str) -> Host {
        let console = lab.file(&format!("{name}.console"));
        let arguments = format!(
            "-machine q35,memory-backend=ram -m 256 -object memory-backend-memfd,id=ram,size=256M,share=on {boot} \
             -chardev socket,id=vu,path={},{how} {device} -serial file:{}",
            socket.display(),
            console.display()
        );
        Host { qemu: Qemu::start(lab, name, &arguments), console }
    }

    /// The last two counts that the guest printed on this host.
    pub(crate) fn counts(&self) -> Option<(u64, u64)> {
        counts(&String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()))
    }

    /// Waits until both counts have grown that much on this host: those of its disk and of its memory.
    pub(crate) fn works(&self, disk: u64, memory: u64) {
        works(|| self.counts(), disk, memory);
    }
}

/// The last two counts in the output of a guest, which must have no error.
pub(crate) fn counts(text: &str) -> Option<(u64, u64)> {
    assert!(!text.contains("\nBAD") && !text.contains("Kernel panic"), "the guest says:\n{text}");
    let complete = &text[..text.rfind('\n').unwrap_or(0)];
    complete.lines().rev().find_map(|line| {
        let mut words = line.trim().strip_prefix("ok ")?.split(' ').map(|count| count.parse().ok());
        Some((words.next()??, words.next()??))
    })
}

/// Waits until both counts have grown by this number.
pub(crate) fn works(counts: impl Fn() -> Option<(u64, u64)>, first: u64, second: u64) {
    let start = wait_for("the guest's first line", &counts);
    wait_for("the guest works on", || {
        let now = counts()?;
        (now.0 >= start.0 + first && now.1 >= start.1 + second).then_some(())
    });
}

/// The arguments of QEMU that boot a guest with a load on its disk.
fn boot(lab: &Lab) -> String {
    boot_with(lab, &[])
}

/// As [`boot`], with `more` parameters of the kernel.
pub(crate) fn boot_with(lab: &Lab, more: &[&str]) -> String {
    initramfs::boot(&initramfs::make(lab, Kernel::Pc, &["virtio_pci", "virtio_blk"], "", "load"), more)
}

#[test]
fn a_linux_guest_moves_there_and_back_and_its_back_ends_die_and_every_byte_is_right() {
    let lab = Lab::new();
    there_and_back(&lab, Kind::Ours, &boot(&lab), &format!("{DISK},packed=off"), &MIGRATIONS);
}

#[test]
fn a_linux_guest_with_packed_rings_moves_there_and_back_too() {
    let lab = Lab::new();
    there_and_back(&lab, Kind::Ours, &boot(&lab), &format!("{DISK},packed=on"), &MIGRATIONS);
}

/// The back-end connects to QEMU (`--connect`), and so does its successor.
#[test]
fn a_linux_guest_whose_front_end_listens_works_on_with_the_successor_of_its_back_end() {
    let lab = Lab::new();
    File::create(lab.disk()).unwrap().set_len(DISK_BYTES).unwrap();
    let (socket, image) = (lab.file("front-end.sock"), lab.disk());
    let arguments = format!("backend blk --connect {} --image {}", socket.display(), image.display());
    let start = |name: &str| {
        let program = env!("CARGO_BIN_EXE_vhost-migrate");
        Process::start(name, program, &words(&arguments), &lab.file(&format!("{name}.log")))
    };
    // The back-end waits until QEMU listens, and QEMU until the back-end connects.
    let mut backend = start("backend");
    let host = Host::start_with(&lab, "host", &boot(&lab), &socket, "server=on", DISK);
    host.works(100, 100);
    backend.kill();
    let mut successor = start("successor");
    host.works(100, 100);
    successor.assert_running();
}

/// A program that prints the disk's size in sectors repeatedly.
const TELLS_SIZE: &str = "busybox mkdir -p /sys\nbusybox mount -t sysfs sys /sys\n\
    (while true; do busybox echo size $(busybox cat /sys/block/vda/size); busybox sleep 1; done) &";

/// Rules B2.1, B2.2.
#[test]
fn a_linux_guest_sees_its_disk_grow_and_works_on() {
    let lab = Lab::new();
    let image = File::create(lab.disk()).unwrap();
    image.set_len(DISK_BYTES).unwrap();
    let mut backend = Backend::start(&lab, Kind::Ours, "backend", &lab.disk(), 1);
    let initramfs = initramfs::make(&lab, Kernel::Pc, &["virtio_pci", "virtio_blk"], TELLS_SIZE, "load");
    let boot = initramfs::boot(&initramfs, &[]);
    let host = Host::start(&lab, "host", &boot, backend.socket(), DISK);
    let sees = |bytes: u64| {
        let line = format!("size {}", bytes / 512);
        wait_for("the guest sees the disk's size", || {
            let text = String::from_utf8_lossy(&fs::read(&host.console).unwrap_or_default()).into_owned();
            text.lines().any(|words| words.trim_end() == line).then_some(())
        });
    };
    sees(DISK_BYTES);
    host.works(100, 100);
    for bytes in [DISK_BYTES + 512, 10 * DISK_BYTES] {
        image.set_len(bytes).unwrap();
        backend.look_again();
        sees(bytes);
        host.works(100, 100);
    }
    // After a restart of the back-end too.
    backend.kill();
    backend.restart();
    image.set_len(11 * DISK_BYTES).unwrap();
    host.works(100, 100);
    backend.look_again();
    sees(11 * DISK_BYTES);
    backend.assert_running();
}

/// The destination's guest reads and writes its disk while most of its memory is still at the source (rule P1.6).
#[test]
fn a_linux_guest_works_on_its_disk_before_its_memory_has_arrived() {
    let lab = Lab::new();
    let image = lab.disk();
    File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
    let backends = ["backend-a", "backend-b"].map(|name| Backend::start(&lab, Kind::OursPostcopy, name, &image, 1));
    let boot = boot(&lab);
    let mut source = Host::start(&lab, "host-0", &boot, backends[0].socket(), DISK);
    source.works(200, 1000);
    let mut destination = Host::start(&lab, "host-1", "-incoming defer", backends[1].socket(), DISK);
    let postcopy = json!({"capabilities": [{"capability": "postcopy-ram", "state": true}]});
    for side in [&mut source.qemu, &mut destination.qemu] {
        side.qmp("migrate-set-capabilities", postcopy.clone());
    }
    let speed = |bytes: u64| json!({"max-postcopy-bandwidth": bytes});
    source.qemu.qmp("migrate-set-parameters", speed(2 << 20));
    migration::begin(&mut source.qemu, &mut destination.qemu, &lab.file("migration"), false, NEVER_CONVERGES);
    // No page was sent twice, and few were sent before the switchover.
    source.qemu.qmp("migrate-start-postcopy", json!({}));
    destination.works(50, 100);
    let info = source.qemu.qmp("query-migrate", json!({}));
    assert_eq!(info["status"], "postcopy-active", "it worked with all its memory: {info}");
    source.qemu.qmp("migrate-set-parameters", speed(10 << 30));
    let info = migration::finish(&mut source.qemu, &mut destination.qemu);
    eprintln!(
        "postcopy: {} ms, downtime {} ms, {} bytes, {} pages on request",
        info["total-time"], info["downtime"], info["ram"]["transferred"], info["ram"]["postcopy-requests"]
    );
    source.qemu.quit();
    destination.works(200, 1000);
    let said = backends[1].output();
    for message in ["POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END"] {
        assert!(said.contains(message), "no {message}");
    }
    assert!(!said.contains("refused"), "{said}");
}

/// Migrates a guest that `boot` starts, and kills its back-ends meanwhile. Returns their output.
pub(crate) fn there_and_back(lab: &Lab, kind: Kind, boot: &str, device: &str, migrations: &[bool]) -> [String; 2] {
    let image = lab.disk();
    File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
    let mut here = Backend::start(lab, kind, "backend-a", &image, 1);
    let mut there = Backend::start(lab, kind, "backend-b", &image, 1);

    let mut source = Host::start(lab, "host-0", boot, here.socket(), device);
    source.works(200, 1000);

    for (number, &multifd) in (1..).zip(migrations) {
        let name = format!("host-{number}");
        let mut destination = Host::start(lab, &name, "-incoming defer", there.socket(), device);
        let socket = lab.file(&format!("{name}.migration"));
        migration::begin(&mut source.qemu, &mut destination.qemu, &socket, multifd, NEVER_CONVERGES);
        source.works(100, 500);
        here.kill();
        here.restart();
        source.works(100, 500);
        migration::limit(&mut source.qemu, GENTLE);
        let info = migration::finish(&mut source.qemu, &mut destination.qemu);
        eprintln!(
            "migration {number}: {} ms, downtime {} ms, {} rounds, {} bytes",
            info["total-time"], info["downtime"], info["ram"]["dirty-sync-count"], info["ram"]["transferred"]
        );
        source.qemu.quit();
        destination.works(200, 1000);

        there.kill();
        there.restart();
        destination.works(200, 1000);
        source = destination;
        std::mem::swap(&mut here, &mut there);
    }
    assert_eq!(source.qemu.qmp("query-status", json!({}))["status"], "running");
    [&mut here, &mut there].map(|backend| {
        backend.assert_running();
        backend.output()
    })
}
