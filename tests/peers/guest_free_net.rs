//! A network device of QEMU without a guest, whose rings are restarted during a migration. QEMU enables and kicks them
//! before it sends SET_LOG_BASE (rules L8.3, L9.3), and frames arrive in between. The memory of source and destination is
//! compared byte by byte.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rstest::rstest;
use serde_json::json;

use crate::linux_net::{Network, backend};
use crate::migration::{self, NEVER_CONVERGES};
use crate::process::{DEADLINE, Lab, Process, wait_for};
use crate::proxy::Proxy;
use crate::qemu::{Qemu, map_ram};
use crate::qtest::Qtest;
use crate::qtest_net::{BUFFERS, Receiver};

/// The memory that the test dirties as the guest's CPU: start and length.
const CPU_PAGES: (u64, u64) = (8 << 20, 8 << 20);
/// Number of frames that arrive without a log, or with the wrong one.
const FRAMES: u16 = 16;

/// A guest that receives frames. The fields are dropped in their order.
struct Source {
    cpu: Cpu,
    net: Process,
    proxy: Proxy,
    qemu: Qemu,
    destination: Qemu,
    _destination_net: Process,
    receiver: Arc<Receiver>,
    sender: Arc<UdpSocket>,
    network: Network,
    lab: Lab,
}

/// Dirties memory until it is dropped, so that a migration does not converge by itself.
struct Cpu {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Cpu {
    fn start(mut qtest: Qtest) -> Cpu {
        let over = Arc::new(AtomicBool::new(false));
        let is_over = over.clone();
        let thread = thread::spawn(move || {
            for byte in (1..=u8::MAX).cycle().take_while(|_| !is_over.load(Ordering::Relaxed)) {
                qtest.fill(CPU_PAGES.0, CPU_PAGES.1, byte);
                qtest.flush();
                thread::sleep(Duration::from_millis(5));
            }
        });
        Cpu { over, thread: Some(thread) }
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // A thread that lost its connection to QEMU has reported it.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Source {
    /// Starts a migration, and waits until all memory of the source was sent once.
    fn migrating(packed: bool) -> Source {
        let (lab, network) = (Lab::new(), Network::new());
        let net = backend(&lab, "net-0", &tap(&network, 0));
        let destination_net = backend(&lab, "net-1", &tap(&network, 1));
        let proxy = Proxy::start(&lab, "proxy.sock", &lab.file("net-0.sock"));
        let device = |socket: &std::path::Path| {
            let packed = if packed { "on" } else { "off" };
            format!(
                "-chardev socket,id=vu,path={},reconnect-ms=100 -netdev vhost-user,id=net,chardev=vu \
                 -device virtio-net-pci,netdev=net,addr=3,romfile=,rx_queue_size={BUFFERS},packed={packed}",
                socket.display()
            )
        };
        let mut qemu = Qemu::guest_free_with(&lab, "host-0", &device(proxy.socket()));
        let incoming = format!("{} -S -incoming defer", device(&lab.file("net-1.sock")));
        let mut destination = Qemu::guest_free_with(&lab, "host-1", &incoming);
        let mut qtest = qemu.qtest();
        let receiver = Arc::new(Receiver::start(&mut qtest, map_ram(&lab, "host-0"), packed));
        let sender = UdpSocket::bind("10.213.47.1:0").unwrap();
        sender.set_broadcast(true).unwrap();
        let sender = Arc::new(sender);
        receive_some(&sender, &receiver);

        let cpu = Cpu::start(qtest);
        migration::begin(&mut qemu, &mut destination, &lab.file("migration"), false, NEVER_CONVERGES);
        let mut source = Source {
            cpu,
            net,
            proxy,
            qemu,
            destination,
            _destination_net: destination_net,
            receiver,
            sender,
            network,
            lab,
        };
        source.rounds(2);
        source
    }

    fn rounds(&mut self, more: u64) {
        let goal = migration::rounds(&mut self.qemu) + more;
        wait_for("the rounds", || (migration::rounds(&mut self.qemu) >= goal).then_some(()));
    }

    /// Sends frames before the next SET_LOG_BASE reaches the back-end. Returns when they have arrived.
    fn receive_before_log(&self) -> mpsc::Receiver<()> {
        let (tell, told) = channel();
        let (sender, receiver) = (self.sender.clone(), self.receiver.clone());
        self.proxy.before_next_log(move || {
            receive_some(&sender, &receiver);
            tell.send(()).unwrap();
        });
        told
    }

    /// Completes the migration, and checks that no page is lost.
    fn hand_over(mut self) {
        self.rounds(1);
        drop(self.cpu);
        migration::let_converge(&mut self.qemu);
        migration::finish(&mut self.qemu, &mut self.destination);
        let there = map_ram(&self.lab, "host-1");
        let lost = self.receiver.ram().snapshot().differing_pages(&there.snapshot());
        assert!(lost.is_empty(), "{} pages differ: {:#x?}", lost.len(), &lost[..lost.len().min(16)]);
        self.net.assert_running();
    }
}

fn tap(network: &Network, number: usize) -> String {
    format!("--tap {}", network.taps[number])
}

/// Sends frames until enough have arrived.
fn receive_some(sender: &UdpSocket, receiver: &Receiver) {
    let goal = receiver.received() + FRAMES;
    wait_for("frames are received", || {
        // A tap that has just been opened may lose some.
        let _ = sender.send_to(&[0x55; 1000], "10.213.47.255:9");
        (receiver.received() >= goal).then_some(())
    });
}

/// Rule L8.3: the marks of the killed back-end are lost, and the rings of its successor run before there is a log.
#[test]
fn what_a_restarted_network_back_end_received_before_there_was_a_log_reaches_the_destination() {
    let mut source = Source::migrating(false);
    let received = source.receive_before_log();
    source.net.kill();
    source.net = backend(&source.lab, "net-0", &tap(&source.network, 0));
    received.recv_timeout(DEADLINE).expect("QEMU starts the rings and then sends SET_LOG_BASE");
    source.hand_over();
}

/// Rule L9.3: QEMU has released the old log, and the rings run with it until SET_LOG_BASE.
#[rstest]
fn what_a_continued_guest_received_before_there_was_a_new_log_reaches_the_destination(
    #[values(false, true)] packed: bool,
) {
    let mut source = Source::migrating(packed);
    source.qemu.qmp("stop", json!({}));
    let received = source.receive_before_log();
    source.qemu.qmp("cont", json!({}));
    received.recv_timeout(DEADLINE).expect("QEMU starts the rings and then sends SET_LOG_BASE");
    source.hand_over();
}
