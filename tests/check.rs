//! `check`: our own back-end keeps every rule, and whoever breaks one is found out, by the rule.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde_json::Value;
use vhost_migrate::abi::vhost_user::{Header, Request as Code};
use vhost_migrate::backend::blk::{Aio, Disk, DiskOptions};
use vhost_migrate::backend::{BackendError, Device, Logging, Message, Notifier, Rings, Session, Setup, Step, Workers};
use vhost_migrate::check::{Options, RULES, Report, Verdict, check};
use vhost_migrate::ring::RingBase;
use zerocopy::{FromZeros, IntoBytes};

const DISK: u64 = 8 << 20;

/// What a back-end does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Bend {
    Nothing,
    /// Need-reply stays in the flags of replies.
    ReplyFlags,
    /// Need-reply brings a second reply to what has one.
    SecondReply,
    /// Unknown requests are left without an answer.
    NoRefusal,
    /// Configuration space is always read from its start.
    ConfigOffset,
    /// GET_VRING_BASE is answered while requests are under way.
    EarlyBase,
    /// The base counts from 0 on every start.
    BaseForgotten,
    /// Data is not logged.
    NoData,
    /// The used ring is logged where it is, whatever `log_guest_addr` says.
    LogAddress,
    /// Whatever is logged, all of memory is.
    Everything,
    /// Another log is not taken over.
    OldLog,
    /// Logging is never switched off.
    NeverOff,
    /// Nothing is logged after the memory table changed.
    MemoryForgetsLog,
    /// The inflight region is not written.
    NoInflight,
    /// A successor takes up a ring behind what was open.
    ForgetsOpen,
    /// An unknown request ends the process.
    Dies,
    /// Rings run although they are not enabled.
    Enabled,
}

/// Workers that are told something else than the session said.
struct Bent {
    bend: Bend,
    workers: Arc<Mutex<Workers>>,
    setup: Option<Setup>,
    starts: u32,
}

impl Bent {
    fn bent(&self, mut logging: Logging) -> Logging {
        let Some(setup) = &self.setup else { return logging };
        match self.bend {
            Bend::NoData => logging.data = None,
            Bend::LogAddress => logging.used = logging.used.map(|(log, _)| (log, setup.layout.areas()[2])),
            Bend::Everything => {
                for region in setup.memory.regions() {
                    logging.data.iter().for_each(|log| log.mark(region.gpa(), region.size()));
                }
            }
            Bend::OldLog => {
                if let (Some(old), Some(new)) = (&setup.logging.data, &mut logging.data) {
                    *new = old.clone();
                }
            }
            Bend::NeverOff if setup.logging.data.is_some() && logging.data.is_none() => return setup.logging.clone(),
            Bend::MemoryForgetsLog if self.starts > 1 => return Logging::default(),
            _ => {}
        }
        logging
    }
}

impl Rings for Bent {
    fn start(&mut self, index: u16, mut setup: Setup) -> Result<(), BackendError> {
        self.starts += 1;
        self.setup = Some(setup.clone());
        setup.logging = self.bent(setup.logging);
        match self.bend {
            Bend::NoInflight => setup.inflight = None,
            Bend::ForgetsOpen => {
                let mut avail = [0; 2];
                setup.memory.read(setup.layout.areas()[1] + 2, &mut avail).unwrap();
                (setup.inflight, setup.base) = (None, RingBase::split(u16::from_le_bytes(avail)));
            }
            Bend::BaseForgotten => setup.base = RingBase::default(),
            _ => {}
        }
        self.workers.lock().unwrap().start(index, setup)
    }

    fn stop(&mut self, index: u16) -> Result<RingBase, BackendError> {
        if self.bend != Bend::EarlyBase {
            return self.workers.lock().unwrap().stop(index);
        }
        let setup = self.setup.as_ref().unwrap();
        let mut avail = [0; 2];
        setup.memory.read(setup.layout.areas()[1] + 2, &mut avail).unwrap();
        let workers = self.workers.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            workers.lock().unwrap().stop(index)
        });
        Ok(RingBase::split(u16::from_le_bytes(avail)))
    }

    fn invalidate(&mut self, iovas: &RangeInclusive<u64>) {
        self.workers.lock().unwrap().invalidate(iovas);
    }

    fn kick(&mut self, index: u16) {
        self.workers.lock().unwrap().kick(index);
    }

    fn set_logging(&mut self, index: u16, logging: Logging) {
        let bent = self.bent(logging);
        if let Some(setup) = &mut self.setup {
            setup.logging = bent.clone();
        }
        self.workers.lock().unwrap().set_logging(index, bent);
    }

    fn set_notifiers(&mut self, index: u16, call: Option<Arc<Notifier>>, error: Option<Arc<Notifier>>) {
        self.workers.lock().unwrap().set_notifiers(index, call, error);
    }
}

/// One front-end's connection, served with a bend.
fn serve(mut socket: UnixStream, device: &Arc<dyn Device>, bend: Bend, alive: &mut bool) -> Option<()> {
    let mut session = Session::new(device.clone());
    let workers = Arc::new(Mutex::new(Workers::new(device.clone())));
    let mut rings = Bent { bend, workers, setup: None, starts: 0 };
    loop {
        let message = receive(&mut socket)?;
        let (code, flags, payload) = (message.code, message.flags, message.payload.clone());
        if bend == Bend::Dies && code.name().is_none() {
            *alive = false;
            return None;
        }
        if bend == Bend::NoRefusal && code.name().is_none() {
            continue;
        }
        let step = session.message(message, &mut rings);
        if bend == Bend::Enabled && code == Code::SET_VRING_KICK {
            let enable =
                Message { code: Code::SET_VRING_ENABLE, flags: 1, payload: vec![0, 0, 0, 0, 1, 0, 0, 0], fds: vec![] };
            session.message(enable, &mut rings);
        }
        let reply = match step {
            Step::Silence => continue,
            Step::Reply(reply) => reply,
            Step::Close(_) => return None,
        };
        let mut bytes = reply.to_bytes();
        if bend == Bend::ReplyFlags {
            bytes[4] |= flags as u8 & 8;
        }
        if bend == Bend::ConfigOffset && code == Code::GET_CONFIG && payload[..4] != [0; 4] {
            bytes[24..].fill(0x77);
        }
        let raw: Vec<_> = reply.fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let iov = [std::io::IoSlice::new(&bytes)];
        sendmsg::<()>(socket.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None).ok()?;
        if bend == Bend::SecondReply && flags & 8 != 0 && code.name().is_some_and(|name| name.starts_with("GET_")) {
            let header = Header { request: code.0, flags: 5, size: 8 };
            socket.write_all(&[header.as_bytes(), &[0; 8]].concat()).ok()?;
        }
    }
}

fn receive(socket: &mut UnixStream) -> Option<Message> {
    let mut header = Header::new_zeroed();
    let mut space = nix::cmsg_space!([i32; 8]);
    let mut fds = Vec::new();
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
    let mut iov = [std::io::IoSliceMut::new(header.as_mut_bytes())];
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags).ok()?;
    for control in received.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(rights) = control {
            // SAFETY: the system has just opened these fds for us.
            fds.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if received.bytes != size_of::<Header>() {
        return None;
    }
    let mut payload = vec![0; Message::payload_size(&header).ok()?];
    socket.read_exact(&mut payload).ok()?;
    Some(Message { code: Code(header.request), flags: header.flags, payload, fds })
}

fn image(folder: &Path) -> DiskOptions {
    let image = folder.join("image");
    let bytes: Vec<u8> = (0..DISK as u32).map(|byte| (byte / 97) as u8).collect();
    std::fs::write(&image, bytes).unwrap();
    DiskOptions {
        image,
        read_only: false,
        queues: 1,
        max_queue_size: 256,
        serial: "check".into(),
        aio: Aio::IoUring,
        direct: false,
        in_order: false,
        inflight_migration: false,
        iommu: false,
        share_rw: false,
        postcopy: false,
    }
}

fn checked(bend: Bend) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let device: Arc<dyn Device> = Arc::new(Disk::open(image(folder.path())).unwrap());
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = thread::spawn(move || {
        for connection in listener.incoming() {
            // The test says goodbye with a byte that begins no message.
            let connection = connection.unwrap();
            let mut first = [0];
            let peeked = nix::sys::socket::recv(connection.as_raw_fd(), &mut first, MsgFlags::MSG_PEEK);
            if peeked == Ok(1) && first == [0xff] {
                break;
            }
            let mut alive = true;
            serve(connection, &device, bend, &mut alive);
            if !alive {
                break;
            }
        }
    });
    let quick = Options { timeout: Duration::from_secs(3), settle: Duration::from_millis(60), ..Options::default() };
    let report = check(&socket, &quick).unwrap();
    if let Ok(mut goodbye) = UnixStream::connect(&socket) {
        goodbye.write_all(&[0xff]).unwrap();
    }
    server.join().unwrap();
    report
}

fn broken(report: &Report) -> BTreeSet<&str> {
    let rules = report.rules().into_iter();
    rules.filter(|(_, verdict)| *verdict == Verdict::Broken).map(|(rule, _)| rule).collect()
}

/// The bend breaks these rules and no other.
fn breaks(bend: Bend, rules: &[&str]) {
    let report = checked(bend);
    assert_eq!(broken(&report), rules.iter().copied().collect(), "{bend:?}\n{report}");
}

/// The bend breaks this rule, and others by what follows.
fn breaks_also(bend: Bend, rule: &str) {
    let report = checked(bend);
    assert!(broken(&report).contains(rule), "{bend:?}\n{report}");
}

#[test]
fn a_back_end_that_breaks_nothing_is_not_blamed() {
    breaks(Bend::Nothing, &[]);
}

#[test]
fn wrong_replies_are_found() {
    breaks(Bend::ReplyFlags, &["F2"]);
    breaks(Bend::SecondReply, &["F3"]);
    breaks(Bend::NoRefusal, &["F5"]);
    breaks(Bend::ConfigOffset, &["C1"]);
}

#[test]
fn a_ring_that_is_not_drained_or_goes_on_elsewhere_is_found() {
    breaks_also(Bend::EarlyBase, "R3");
    breaks_also(Bend::BaseForgotten, "R4");
    breaks(Bend::Enabled, &["L8", "R2"]);
}

#[test]
fn pages_that_are_not_marked_are_found() {
    breaks(Bend::NoData, &["L1", "L2", "L8", "L9", "L11", "M1"]);
    breaks(Bend::LogAddress, &["L3", "L4"]);
    breaks(Bend::OldLog, &["L9"]);
    breaks(Bend::NeverOff, &["L7"]);
    breaks(Bend::MemoryForgetsLog, &["L9", "M1"]);
}

#[test]
fn pages_that_are_marked_for_nothing_are_a_warning_with_their_share() {
    let report = checked(Bend::Everything);
    assert!(!report.is_broken(), "{report}");
    let data = report.findings.iter().find(|finding| finding.rule == "L1").unwrap();
    assert!(data.verdict == Verdict::Warning && data.seen.contains("% of the marks"), "{report}");
}

#[test]
fn an_inflight_region_that_is_not_kept_is_found() {
    // Where packed rings go on, only the region knows.
    breaks(Bend::NoInflight, &["I2", "I4", "I6", "L15"]);
    breaks_also(Bend::ForgetsOpen, "I3");
}

#[test]
fn a_back_end_that_dies_is_a_finding_and_what_comes_after_is_not_held_against_it() {
    let report = checked(Bend::Dies);
    assert_eq!(broken(&report), BTreeSet::from(["F5", "R9"]), "{report}");
    assert_eq!(report.rules().get("R3"), Some(&Verdict::NotTested), "{report}");
}

fn command(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-migrate")).arg("check").args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Rules that the whole of `check` sees kept by our own back-end.
const KEPT: &[&str] = &[
    "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8", "R9", "R10", "L1",
    "L2", "L3", "L4", "L6", "L7", "L8", "L9", "L10", "L11", "L12", "L15", "M1", "C1", "I1", "I2", "I3", "I4", "I5",
    "I6", "I7",
];
/// What can't be seen from outside, or is behind an option that is off.
const ASIDE: &[&str] = &["B4", "L5", "L13", "L14", "I8", "I9"];

#[test]
fn our_own_back_end_keeps_every_rule_killed_and_attacked() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path()).image;
    let before = std::fs::read(&image).unwrap();
    let (socket, junit) = (folder.path().join("socket"), folder.path().join("check.xml"));
    let program = env!("CARGO_BIN_EXE_vhost-migrate");
    let (socket, xml) = (socket.to_str().unwrap(), junit.to_str().unwrap());
    let start = format!("{program} backend blk --socket {socket} --image {} --queues 2", image.display());
    let output = command(&[socket, "--json", "--hostile", "--write", "--restart", &start, "--junit", xml]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
    assert_eq!(report["broken"], false);
    assert!(std::fs::read(&image).unwrap() == before, "the disk is not as it was");
    let rules = report["rules"].as_object().unwrap();
    let of =
        |verdict: &str| rules.iter().filter(|(_, v)| *v == verdict).map(|(rule, _)| &**rule).collect::<BTreeSet<_>>();
    // What is left is what no check is about: nothing is passed over for want of an option.
    for finding in report["report"]["findings"].as_array().unwrap() {
        let aside = ASIDE.contains(&finding["rule"].as_str().unwrap()) || finding["seen"] == "no check is about it";
        assert!(finding["verdict"] == "kept" || aside, "{finding}");
    }
    assert_eq!(of("kept"), KEPT.iter().copied().collect(), "{report:#}");
    assert!(!text(&output.stderr).contains("panicked"));
    assert!(UnixStream::connect(socket).is_err(), "what the check started outlived it");
    let xml = std::fs::read_to_string(junit).unwrap();
    assert!(xml.contains("failures=\"0\" errors=\"0\""), "{xml}");
    assert_eq!(xml.matches("<testcase ").count(), report["report"]["findings"].as_array().unwrap().len());
    assert_eq!(xml.matches("</testcase>").count(), xml.matches("<testcase ").count());
}

#[test]
fn our_own_network_interface_keeps_every_rule_with_frames_that_leave_and_that_come_in() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let (program, socket) = (env!("CARGO_BIN_EXE_vhost-migrate"), socket.to_str().unwrap());
    let start = format!("{program} backend net --socket {socket} --loopback --queue-pairs 2");
    let output = command(&[socket, "--json", "--hostile", "--feed", "loop", "--restart", &start]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
    let findings = report["report"]["findings"].as_array().unwrap();
    let disks = |finding: &Value| finding["seen"] == "a disk is not offered";
    // With device state there is no status (rule D1).
    let absent = ["RING_PACKED is not offered", "STATUS is not offered"];
    let not_offered = |finding: &Value| absent.contains(&finding["seen"].as_str().unwrap()) || finding["rule"] == "I4";
    for finding in findings.iter().filter(|finding| !disks(finding) && !not_offered(finding)) {
        let aside = ASIDE.contains(&finding["rule"].as_str().unwrap()) || finding["seen"] == "no check is about it";
        assert!(finding["verdict"] == "kept" || aside, "{finding}");
    }
    for (rule, rings) in
        [("L1", "split receive"), ("R3", "split receive"), ("R3", "split transmit"), ("L3", "split receive")]
    {
        let seen = findings.iter().any(|finding| finding["rule"] == rule && finding["rings"] == rings);
        assert!(seen, "{rule} on {rings} was not checked: {report:#}");
    }
}

#[test]
fn without_frames_that_come_in_the_rest_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, wire) = (folder.path().join("socket"), folder.path().join("wire"));
    let (program, socket) = (env!("CARGO_BIN_EXE_vhost-migrate"), socket.to_str().unwrap());
    let start = format!("{program} backend net --socket {socket} --pair {}", wire.display());
    let output = command(&[socket, "--json", "--restart", &start]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
    assert_eq!((&report["rules"]["L1"], &report["rules"]["L3"]), (&"not-tested".into(), &"kept".into()), "{report:#}");
    // The other end of the wire is a feed.
    let other = folder.path().join("other");
    let other = other.to_str().unwrap();
    let arguments = ["backend", "net", "--socket", other, "--pair", wire.to_str().unwrap()];
    let mut peer = Command::new(program).args(arguments).spawn().unwrap();
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while UnixStream::connect(other).is_err() {
        assert!(std::time::Instant::now() < end, "{other} is not there");
        thread::sleep(Duration::from_millis(5));
    }
    let output = command(&[socket, "--json", "--feed", other, "--restart", &start]);
    peer.kill().unwrap();
    peer.wait().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
    for rule in ["L1", "L2", "L9", "M1"] {
        assert_eq!(report["rules"][rule], "kept", "{report:#}");
    }
}

#[test]
fn the_exit_status_says_what_kind_of_trouble_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let nobody = folder.path().join("nobody");
    let nobody = nobody.to_str().unwrap();
    let nothing_there = command(&[nobody]);
    assert_eq!(nothing_there.status.code(), Some(3));
    assert!(text(&nothing_there.stderr).contains("is the back-end running"), "{}", text(&nothing_there.stderr));
    for wrong in [
        &[nobody, "--queue-size", "100"][..],
        &[nobody, "--feed", ""],
        &[nobody, "--kill-pid", "5"],
        &[nobody, "--timeout", "0"],
        &[],
    ] {
        assert_eq!(command(wrong).status.code(), Some(2), "{wrong:?}");
    }
    assert_eq!(command(&[nobody, "--restart", "false"]).status.code(), Some(3));
    // Somebody who accepts and is silent, and somebody who hangs up.
    for hold in [true, false] {
        let socket = folder.path().join(format!("mute-{hold}"));
        let listener = UnixListener::bind(&socket).unwrap();
        let mute = thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            if hold {
                let _ = connection.read_to_end(&mut Vec::new());
            }
        });
        let output = command(&[socket.to_str().unwrap(), "--timeout", "1"]);
        assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
        mute.join().unwrap();
    }
}

#[test]
fn every_rule_of_the_table_has_a_verdict() {
    let table = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/protocol.md")).unwrap();
    let table = table.split("## Where each is shown").next().unwrap();
    let rules = table.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" | ")).map(|(id, _)| id);
    let documented: BTreeSet<&str> = rules.filter(|id| id.ends_with(|last: char| last.is_ascii_digit())).collect();
    let known: BTreeSet<&str> = RULES.iter().map(|(rule, _)| *rule).collect();
    assert_eq!(known, documented);
}
