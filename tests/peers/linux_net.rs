//! A Linux guest in QEMU whose network interface is served by `backend net`: taps on a bridge of the host, an echo at the
//! bridge, and a guest that exchanges datagrams with it during migrations. The taps need root.

use std::io::{Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{self, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rstest::rstest;
use serde_json::json;

use crate::backend::words;
use crate::initramfs::{self, Kernel};
use crate::linux_guest::Host;
use crate::migration::{self, GENTLE};
use crate::process::{Lab, Process, wait_for};

/// Number of queue pairs, more than the guest has CPUs. The guest uses one. Frames that the tap has for the other pairs
/// must not be lost.
const DEVICE: &str = "-netdev vhost-user,id=net,chardev=vu,queues=2 \
                      -device virtio-net-pci,netdev=net,mq=on,mac=52:54:00:47:47:47";

/// The address of the echo.
const ECHO: &str = "10.213.47.1:4747";
/// Commands that set up the guest's interface for the echo.
pub(crate) const UP: &str = "busybox ip link set eth0 up\nbusybox ip addr add 10.213.47.2/24 dev eth0";

/// A bridge with two taps and an echo at its address, removed on drop. Its address permits one at a time.
pub(crate) struct Network {
    _only: MutexGuard<'static, ()>,
    bridge: String,
    pub(crate) taps: [String; 2],
    stop: Arc<AtomicBool>,
    echo: Option<JoinHandle<()>>,
}

impl Network {
    pub(crate) fn new() -> Network {
        static ONLY: Mutex<()> = Mutex::new(());
        let _only = ONLY.lock().unwrap_or_else(PoisonError::into_inner);
        let name = |kind: &str| format!("vm{}{kind}", process::id());
        let (bridge, taps) = (name("br"), [name("a"), name("b")]);
        let stop = Arc::new(AtomicBool::new(false));
        let mut network = Network { _only, bridge: bridge.clone(), taps: taps.clone(), stop: stop.clone(), echo: None };
        ip(&format!("link add {bridge} type bridge"));
        for tap in &taps {
            ip(&format!("tuntap add dev {tap} mode tap multi_queue"));
            ip(&format!("link set {tap} master {bridge} up"));
        }
        ip(&format!("addr add 10.213.47.1/24 dev {bridge}"));
        ip(&format!("link set {bridge} up"));
        let socket = UdpSocket::bind(ECHO).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        network.echo = Some(thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            while !stop.load(Ordering::Relaxed) {
                let received: Option<(usize, SocketAddr)> = socket.recv_from(&mut buffer).ok();
                if let Some((len, from)) = received {
                    let _ = socket.send_to(&buffer[..len], from);
                }
            }
        }));
        network
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(echo) = self.echo.take() {
            let _ = echo.join();
        }
        for link in self.taps.iter().chain([&self.bridge]) {
            let _ = Command::new("ip").args(["link", "del", link]).output();
        }
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(words(arguments)).output().expect("ip: tests/peers/install installs it");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Starts `backend net` with `args`, at NAME.sock of the lab.
pub(crate) fn backend(lab: &Lab, name: &str, args: &str) -> Process {
    let args = format!("backend net --socket {} {args}", lab.file(&format!("{name}.sock")).display());
    let program = env!("CARGO_BIN_EXE_vhost-migrate");
    let process = Process::start(name, program, &words(&args), &lab.file(&format!("{name}.log")));
    wait_for("the back-end listens", || process.output().contains("serves ").then_some(()));
    process
}

/// The number of completed requests of a ring, from `--metrics` at this socket.
fn completed(metrics: &Path, ring: u32) -> u64 {
    let mut socket = UnixStream::connect(metrics).unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    let name = format!("vhost_requests_total{{ring=\"{ring}\"}} ");
    answer.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

/// QEMU serves the control queue itself. The back-end does not receive the number of pairs that the driver uses, and
/// receives on the rings that QEMU enables (rule R11.2).
#[test]
fn every_pair_that_qemu_enables_receives() {
    let (lab, network) = (Lab::new(), Network::new());
    let metrics = lab.file("metrics");
    let args = format!("--tap {} --queue-pairs 2 --metrics unix:{}", network.taps[0], metrics.display());
    let mut net = backend(&lab, "net", &args);
    let initramfs = initramfs::make(&lab, Kernel::Pc, &["virtio_pci", "virtio_net"], UP, "net");
    let boot = format!("-smp 2 {}", initramfs::boot(&initramfs, &[]));
    let host = Host::start(&lab, "host", &boot, &lab.file("net.sock"), DEVICE);
    host.works(50, 0);
    // The tap spreads flows over its queues.
    let flows: Vec<UdpSocket> = (0..64).map(|_| UdpSocket::bind("10.213.47.1:0").unwrap()).collect();
    let before = [0, 2].map(|ring| completed(&metrics, ring));
    wait_for("both receive queues get some", || {
        flows.iter().for_each(|flow| _ = flow.send_to(b"hello", "10.213.47.2:9"));
        let now = [0, 2].map(|ring| completed(&metrics, ring));
        (now[0] > before[0] && now[1] > before[1]).then_some(())
    });
    net.assert_running();
}

#[rstest]
#[case::split("packed=off", 4, false)]
#[case::packed_with_a_driver_that_can_not_announce_itself("packed=on,guest_announce=off", 2, true)]
fn a_linux_guest_goes_on_talking_through_taps_while_it_moves_there_and_back(
    #[case] more: &str,
    #[case] moves: u32,
    #[case] announced_by_its_device: bool,
) {
    let (lab, network, device) = (Lab::new(), Network::new(), format!("{DEVICE},{more}"));
    let mut backends: Vec<Process> = (0..2)
        .map(|number| {
            let args = format!("--tap {} --queue-pairs 2 --log-level debug", network.taps[number]);
            backend(&lab, &format!("net-{number}"), &args)
        })
        .collect();
    let boot = initramfs::boot(&initramfs::make(&lab, Kernel::Pc, &["virtio_pci", "virtio_net"], UP, "net"), &[]);
    let mut source = Host::start(&lab, "host-0", &boot, &lab.file("net-0.sock"), &device);
    source.works(200, 0);
    for number in 1..=moves {
        let name = format!("host-{number}");
        let index = number as usize % 2;
        let there = lab.file(&format!("net-{index}.sock"));
        let announced = |net: &Process| net.output().matches(" SEND_RARP: ").count();
        let before = announced(&backends[index]);
        let mut destination = Host::start(&lab, &name, "-incoming defer", &there, &device);
        let socket = lab.file(&format!("{name}.migration"));
        migration::begin(&mut source.qemu, &mut destination.qemu, &socket, false, GENTLE);
        migration::finish(&mut source.qemu, &mut destination.qemu);
        source.qemu.quit();
        destination.works(200, 0);
        assert_eq!(announced(&backends[index]) > before, announced_by_its_device, "SEND_RARP at the destination");
        eprintln!("migration {number}: {:?} answered and lost", destination.counts());
        source = destination;
    }
    assert_eq!(source.qemu.qmp("query-status", json!({}))["status"], "running");
    backends.iter_mut().for_each(Process::assert_running);
}
