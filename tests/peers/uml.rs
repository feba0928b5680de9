//! User-mode Linux as front-end: checked I/O on this project's back-ends, and their dirty log. It does not log, so a proxy
//! switches logging on. Its properties are in rules F4.2, F6.2, F8.1, R4.4, R7.1 and B3.3.

use std::collections::BTreeSet;
use std::fs;
use std::fs::File;
use std::net::UdpSocket;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vhost_migrate::abi::vhost_user::ProtocolFeatures;
use vhost_migrate::abi::virtio::{VIRTIO_F_RING_PACKED, VirtioFeatures};

use crate::backend::{Backend, Kind, words};
use crate::initramfs::{self, Kernel};
use crate::linux_guest::{counts, works};
use crate::linux_net::{self, Network, UP};
use crate::process::{Lab, Process, wait_for};
use crate::proxy::{Hidden, Proxy, TestLog};

const PAGE: usize = 4096;
/// The guest's commands write to the kernel's log, which UML writes to a file.
const TO_THE_LOG: &str = "exec >/dev/kmsg 2>&1";

/// Features hidden from UML, which uses all features that it knows: split or packed rings, call fds or in-band
/// notifications.
const AS_OFFERED: Hidden = Hidden { features: VirtioFeatures::empty(), protocol_features: ProtocolFeatures::empty() };
const SPLIT_WITH_FDS: Hidden =
    Hidden { features: VIRTIO_F_RING_PACKED, protocol_features: ProtocolFeatures::INBAND_NOTIFICATIONS };

/// A guest. All of its processes are in a PID namespace and end with the first.
struct Uml(Process);

impl Uml {
    /// `id` is the device's virtio number.
    fn boot(lab: &Lab, initramfs: &Path, socket: &Path, id: u16) -> Uml {
        let args = format!(
            "--map-root-user --pid --fork --kill-child linux.uml mem=192M initrd={} con=null con0=null,fd:1 \
             printk.devkmsg=on virtio_uml.device={}:{id}",
            initramfs.display(),
            socket.display()
        );
        Uml(Process::start("uml", "unshare", &words(&args), &lab.file("uml.console")))
    }

    /// The last count of the guest after it was continued.
    fn counts(&self) -> Option<(u64, u64)> {
        counts(self.0.output().rsplit("\nagain").next()?)
    }

    fn works(&self, first: u64, second: u64) {
        works(|| self.counts(), first, second);
    }

    /// Stops the guest's CPU. No thread of the guest runs when this returns.
    fn freeze(&self) {
        let main = self.main();
        kill(main, Signal::SIGSTOP).unwrap();
        // The processes of its user space stop at their next trap, which is not handled.
        wait_for("the guest stands still", || {
            let running = [main].into_iter().chain(children(main)).any(|pid| state(pid).is_none_or(|now| now == 'R'));
            (!running && state(main) == Some('T')).then_some(())
        });
    }

    fn go_on(&self) {
        kill(self.main(), Signal::SIGCONT).unwrap();
    }

    fn main(&self) -> Pid {
        children(self.0.pid())[0]
    }
}

fn children(pid: Pid) -> Vec<Pid> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap())).collect()
}

/// The state letter of `/proc/PID/stat`; Z for a process that has ended.
fn state(pid: Pid) -> Option<char> {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return Some('Z') };
    stat.rsplit(") ").next()?.chars().next()
}

/// Stops all threads of a back-end.
fn stop(backend: &Process) {
    backend.signal(Signal::SIGSTOP);
    wait_for("the back-end stands still", || {
        let tasks = fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
        let pids = tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap());
        pids.map(Pid::from_raw).all(|pid| state(pid) == Some('T')).then_some(())
    });
}

/// Runs the device while the guest's CPU is stopped, so that it alone changes guest memory. Returns the changed and the
/// marked pages. `poke` gives the device a request.
fn device_writes(
    uml: &Uml,
    backend: &Process,
    proxy: &Proxy,
    log: &TestLog,
    poke: impl Fn(),
) -> (BTreeSet<u64>, BTreeSet<u64>) {
    for _ in 0..100 {
        stop(backend);
        thread::sleep(Duration::from_millis(10)); // requests arrive that are not served; if there are none, again
        uml.freeze();
        let before = proxy.contents();
        log.clear();
        backend.signal(Signal::SIGCONT);
        poke();
        let start = Instant::now();
        while log.pages().is_empty() && start.elapsed() < Duration::from_millis(500) {
            thread::sleep(Duration::from_millis(1));
        }
        proxy.disable();
        let (after, marked) = (proxy.contents(), log.pages());
        proxy.enable();
        uml.go_on();
        if !marked.is_empty() {
            return (differing_pages(&before, &after), marked);
        }
    }
    panic!("the device marks nothing");
}

fn differing_pages(before: &[(u64, Vec<u8>)], after: &[(u64, Vec<u8>)]) -> BTreeSet<u64> {
    let regions = before.iter().zip(after);
    let pages = regions.flat_map(|((gpa, before), (_, after))| {
        let pages = before.chunks(PAGE).zip(after.chunks(PAGE));
        (gpa / PAGE as u64..).zip(pages).filter(|(_, (a, b))| a != b).map(|(page, _)| page)
    });
    pages.collect()
}

/// Compares the log of a running guest with the changes of its memory, repeatedly, until `least` pages have changed.
fn the_log_misses_nothing(uml: &Uml, backend: &Process, proxy: &Proxy, least: usize, poke: impl Fn()) {
    let log = TestLog::new();
    proxy.log_on(&log, 0);
    let (mut all_changed, mut all_marked, mut round) = (0, 0, 0);
    while round < 20 || all_changed < least {
        assert!(round < 400, "only {all_changed} pages changed");
        round += 1;
        let (changed, marked) = device_writes(uml, backend, proxy, &log, &poke);
        let missed: Vec<_> = changed.difference(&marked).collect();
        assert!(missed.is_empty(), "round {round}: missed pages {missed:#x?} of {} marked", marked.len());
        all_changed += changed.len();
        all_marked += marked.len();
    }
    proxy.log_off();
    eprintln!("{all_changed} pages changed, {all_marked} marked");
    // A write of equal contents is marked, and the comparison does not see it.
    assert!(all_marked <= 2 * all_changed + round * 8, "{all_marked} pages marked where {all_changed} changed");
}

/// Rules R7.1 to R7.3.
fn a_guest_works_on_its_disk(hidden: Hidden) {
    let lab = Lab::new();
    let image = lab.disk();
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let backend = Backend::start(&lab, Kind::Ours, "backend", &image, 1);
    let proxy = Proxy::hiding(&lab, "proxy.sock", backend.socket(), hidden);
    let (again, off) = (lab.file("again"), lab.file("off"));
    // Both parts end with an unbound driver, which stops the rings. The second one begins with its bind.
    let commands = format!(
        "{TO_THE_LOG}
         busybox mkdir /host && busybox mount -t hostfs none /host -o {}
         part() {{
            /load & load=$!
            until busybox test -e /host/$1; do busybox sleep 1; done
            kill $load; wait $load; busybox rmmod virtio_blk; echo $1
         }}
         part again; busybox insmod /0.ko; busybox dd if=/dev/zero of=/dev/vda bs=1M count=64; part off; busybox poweroff -f",
        again.parent().unwrap().display()
    );
    let initramfs = initramfs::make(&lab, Kernel::Uml, &["virtio_blk"], &commands, "load");
    let mut uml = Uml::boot(&lab, &initramfs, proxy.socket(), 2);
    uml.works(500, 500);
    the_log_misses_nothing(&uml, backend.process(), &proxy, 200, || {});
    uml.works(200, 200);

    File::create(&again).unwrap();
    wait_for("the driver is unbound", || uml.0.output().contains("\nagain").then_some(()));
    uml.works(500, 500);
    File::create(&off).unwrap();
    assert!(uml.0.wait().success());
}

#[test]
fn a_guest_works_on_its_disk_with_packed_rings_and_signals_in_messages() {
    a_guest_works_on_its_disk(AS_OFFERED);
}

#[test]
fn a_guest_works_on_its_disk_with_split_rings_and_signals_over_fds() {
    a_guest_works_on_its_disk(SPLIT_WITH_FDS);
}

#[test]
fn a_guest_whose_back_end_dies_loses_its_disk_for_good_and_the_next_guest_is_served() {
    let (lab, next) = (Lab::new(), Lab::new());
    let image = lab.disk();
    let empty = || File::create(&image).unwrap().set_len(64 << 20).unwrap();
    empty();
    let mut backend = Backend::start(&lab, Kind::Ours, "backend", &image, 1);
    // Requests in flight are never completed, so a process without one checks the guest.
    let commands = format!(
        "{TO_THE_LOG}
         watch() {{ while busybox head -c 1 /dev/vda >/dev/null; do busybox sleep 1; done; echo gone; }}
         watch &"
    );
    let initramfs = initramfs::make(&lab, Kernel::Uml, &["virtio_blk"], &commands, "load");
    let uml = Uml::boot(&lab, &initramfs, backend.socket(), 2);
    uml.works(200, 200);
    backend.kill();
    wait_for("the guest's kernel takes the disk away", || uml.0.output().contains("\ngone").then_some(()));
    // Earlier reads were right, later reads fail.
    let output = uml.0.output();
    let complaints = output.lines().filter(|line| line.starts_with("BAD"));
    complaints.for_each(|line| assert!(line.starts_with("BAD read at") || line.starts_with("BAD write at"), "{line}"));
    // It does not connect to a restarted back-end, so that another guest can use it.
    empty();
    backend.restart();
    let other = Uml::boot(&next, &initramfs, backend.socket(), 2);
    other.works(500, 500);
}

#[test]
fn a_guest_talks_over_a_tap_and_what_it_receives_is_logged() {
    let (lab, network) = (Lab::new(), Network::new());
    let backend = linux_net::backend(&lab, "net", &format!("--tap {}", network.taps[0]));
    let proxy = Proxy::start(&lab, "proxy.sock", &lab.file("net.sock"));
    let initramfs = initramfs::make(&lab, Kernel::Uml, &["virtio_net"], &format!("{TO_THE_LOG}\n{UP}"), "net");
    let uml = Uml::boot(&lab, &initramfs, proxy.socket(), 1);
    uml.works(500, 0);
    let sender = UdpSocket::bind("10.213.47.1:0").unwrap();
    let poke = || {
        for number in 0..16u8 {
            sender.send_to(&[number | 1; 1400], "10.213.47.2:9").unwrap();
        }
    };
    the_log_misses_nothing(&uml, &backend, &proxy, 50, poke);
    uml.works(500, 0);
}
