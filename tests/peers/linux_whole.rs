//! A real Linux guest in QEMU with both devices of this project, several queues each. It is stopped and continued,
//! migrated in both directions, gets more memory and another disk under load, and is reset. Its disk has packed rings
//! and its network interface split rings, so that both kinds are tested in every step.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::backend::{Backend, Kind};
use crate::initramfs::{self, Kernel};
use crate::linux_guest::{counts, works};
use crate::linux_net::{Network, UP, backend};
use crate::migration::{self, GENTLE};
use crate::process::{Lab, Process, wait_for};
use crate::qemu::Qemu;

const DISK_BYTES: u64 = 64 << 20;
/// The names of the serial ports on which the guest's disk and network loads report.
const SERIALS: [&str; 2] = ["disk", "net"];

/// A QEMU that runs the guest or waits for its migration.
struct Host {
    qemu: Qemu,
    consoles: [PathBuf; 2],
}

impl Host {
    fn start(lab: &Lab, name: &str, boot: &str, disk: &Path, net: &Path) -> Host {
        let consoles = SERIALS.map(|serial| lab.file(&format!("{name}.{serial}")));
        let arguments = format!(
            "-machine q35,memory-backend=ram -smp 2 -m 256,slots=2,maxmem=1G -object memory-backend-memfd,id=ram,size=256M,share=on \
             {boot} -chardev socket,id=vu,path={},reconnect-ms=100 -device vhost-user-blk-pci,chardev=vu,num-queues=2,packed=on \
             -chardev socket,id=vn,path={},reconnect-ms=100 -netdev vhost-user,id=net,chardev=vn,queues=2 \
             -device virtio-net-pci,netdev=net,mq=on,mac=52:54:00:47:47:48 -device pcie-root-port,id=spare,chassis=1 \
             -serial file:{} -serial file:{}",
            disk.display(),
            net.display(),
            consoles[0].display(),
            consoles[1].display(),
        );
        Host { qemu: Qemu::start(lab, name, &arguments), consoles }
    }

    /// Waits until both loads have made progress, and asserts that they report no error.
    fn works(&self) {
        for (console, more) in self.consoles.iter().zip([(100, 200), (100, 0)]) {
            let told = || counts(&String::from_utf8_lossy(&fs::read(console).unwrap_or_default()));
            works(told, more.0, more.1);
        }
    }

    fn has(&mut self, device: &str) -> bool {
        let devices = self.qemu.qmp("qom-list", json!({"path": "/machine/peripheral"}));
        devices.as_array().unwrap().iter().any(|found| found["name"] == device)
    }
}

fn socket_chardev(id: &str, path: &Path) -> Value {
    let addr = json!({"type": "unix", "data": {"path": path}});
    let data = json!({"addr": addr, "server": false, "reconnect-ms": 100});
    json!({"id": id, "backend": {"type": "socket", "data": data}})
}

#[test]
fn a_linux_guest_with_a_disk_and_a_network_goes_through_all_that_qemu_can_do_to_it() {
    let (lab, network) = (Lab::new(), Network::new());
    let image = lab.disk();
    File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
    let mut disks = ["disk-a", "disk-b"].map(|name| Backend::start(&lab, Kind::Ours, name, &image, 2));
    let mut nets: Vec<Process> = ["net-a", "net-b"]
        .iter()
        .zip(&network.taps)
        .map(|(name, tap)| backend(&lab, name, &format!("--tap {tap} --queue-pairs 2 --log-level debug")))
        .collect();
    let net_sockets = ["net-a", "net-b"].map(|name| lab.file(&format!("{name}.sock")));
    let commands = format!("{UP}\n/net >/dev/ttyS1 2>&1 &");
    let drivers = ["virtio_pci", "virtio_blk", "virtio_net"];
    let initramfs = initramfs::make_with(&lab, Kernel::Pc, &drivers, &commands, &["net"], "load");
    let boot = initramfs::boot(&initramfs, &[]);
    let mut host = Host::start(&lab, "host-0", &boot, disks[0].socket(), &net_sockets[0]);
    host.works();

    // Stops and continues the guest under load: GET_VRING_BASE, and a new start on the same connection.
    for _ in 0..3 {
        host.qemu.qmp("stop", json!({}));
        host.qemu.qmp("cont", json!({}));
        host.works();
    }

    for number in 1..=4 {
        let (there, name) = (number % 2, format!("host-{number}"));
        let mut destination =
            Host::start(&lab, &name, &format!("{boot} -incoming defer"), disks[there].socket(), &net_sockets[there]);
        let socket = lab.file(&format!("{name}.migration"));
        migration::begin(&mut host.qemu, &mut destination.qemu, &socket, false, GENTLE);
        let info = migration::finish(&mut host.qemu, &mut destination.qemu);
        eprintln!("migration {number}: {} ms, downtime {} ms", info["total-time"], info["downtime"]);
        host.qemu.quit();
        host = destination;
        host.works();
    }

    // Adds memory: memory slots are added while both devices serve requests.
    let added = |net: &Process| net.output().matches(" ADD_MEM_REG: ").count();
    for (memory, dimm) in [("more-1", "dimm-1"), ("more-2", "dimm-2")] {
        let before = added(&nets[0]);
        let object = json!({"qom-type": "memory-backend-memfd", "id": memory, "size": 128 << 20, "share": true});
        host.qemu.qmp("object-add", object);
        host.qemu.qmp("device_add", json!({"driver": "pc-dimm", "id": dimm, "memdev": memory}));
        host.works();
        assert!(added(&nets[0]) > before, "the back-end got no ADD_MEM_REG for {dimm}");
    }

    // Adds and removes another disk.
    let second = lab.file("second.img");
    File::create(&second).unwrap().set_len(DISK_BYTES).unwrap();
    let mut guest_disk = Backend::start(&lab, Kind::OursPostcopy, "disk-c", &second, 1);
    for _ in 0..2 {
        let before = guest_disk.output().matches("SET_VRING_KICK").count();
        host.qemu.qmp("chardev-add", socket_chardev("vu2", guest_disk.socket()));
        let device =
            json!({"driver": "vhost-user-blk-pci", "chardev": "vu2", "bus": "spare", "id": "second", "num-queues": 1});
        host.qemu.qmp("device_add", device);
        wait_for("the guest's driver takes the new disk", || {
            (guest_disk.output().matches("SET_VRING_KICK").count() > before).then_some(())
        });
        host.works();
        host.qemu.qmp("device_del", json!({"id": "second"}));
        wait_for("the guest lets the disk go", || (!host.has("second")).then_some(()));
        // QEMU may not have released the device yet.
        wait_for("its chardev is free", || host.qemu.try_qmp("chardev-remove", json!({"id": "vu2"})).ok());
        host.works();
    }
    guest_disk.assert_running();

    // Resets the guest under load. It boots again and expects a blank disk.
    host.qemu.qmp("stop", json!({}));
    host.qemu.qmp("system_reset", json!({}));
    let blank = File::options().write(true).open(&image).unwrap();
    blank.set_len(0).unwrap();
    blank.set_len(DISK_BYTES).unwrap();
    host.qemu.qmp("cont", json!({}));
    let console = host.consoles[0].clone();
    wait_for("the guest boots again and its program starts", || {
        let said = String::from_utf8_lossy(&fs::read(&console).unwrap()).into_owned();
        said.rsplit_once("Linux version").is_some_and(|(_, since)| since.contains("\nok ")).then_some(())
    });
    host.works();
    assert_eq!(host.qemu.qmp("query-status", json!({}))["status"], "running");
    disks.iter_mut().for_each(Backend::assert_running);
    nets.iter_mut().for_each(Process::assert_running);

    // QEMU is killed. A new QEMU finds both devices in their initial state.
    drop(host);
    blank.set_len(0).unwrap();
    blank.set_len(DISK_BYTES).unwrap();
    let host = Host::start(&lab, "host-9", &boot, disks[0].socket(), &net_sockets[0]);
    host.works();
}
