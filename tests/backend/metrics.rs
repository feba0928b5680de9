//! Metrics of writes outside the log and of resubmitted requests.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr};
use rstest::rstest;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, LogDescription};
use vhost_migrate::dirty::Log;
use vhost_migrate::memory::GuestAddress;
use zerocopy::IntoBytes;

use crate::guest::{BASIC, Guest, Ring, inflight_region, negotiate, start_logging};
use crate::hostile::assert_ring_works;
use crate::prometheus::{counter_value, fetch_metrics};
use crate::raw::{RawFrontend, VERSION};
use crate::server::{Process, disk_options};
use crate::wait::wait_until;

/// The sum of a counter's series, as fetched over TCP.
fn counted(address: &str, name: &str) -> u64 {
    counter_value(&fetch_metrics(TcpStream::connect(address).unwrap()), name, "")
}

#[test]
fn writes_outside_the_log_and_requests_of_a_predecessor_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let image = disk_options(folder.path(), 1 << 20, |_| {}).image;
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let socket = folder.path().join("s");
    let _process = Process::start(&socket, &image, &["--metrics", &format!("tcp:{address}"), "--queues", "2"]);
    let (guest, client) = (Guest::new(), RawFrontend::connect(&socket));
    // Three requests that a predecessor took and did not complete.
    let mut ring = Ring::new(&guest, 0, 512, BASIC);
    for slot in 0..3 {
        ring.read(&guest, slot, 8, 512);
    }
    let _ = ring.driver.publish();
    let (region, fd, description) = inflight_region(BASIC, 1, 512);
    ring.take_requests(&guest, &region, 3);
    negotiate(&client, &guest, BASIC);
    client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
    ring.set_up(&client, &guest, ring.initial_base());
    // A log of eight pages. The device's writes are outside it.
    let (_log, fd) = Log::create(GuestAddress(4096)).unwrap();
    let description = LogDescription { mmap_size: 1, mmap_offset: 0 };
    client.send(Code::SET_LOG_BASE, VERSION, description.as_bytes(), &[fd.as_fd()]);
    client.reply(Code::SET_LOG_BASE);
    start_logging(&client, &guest, BASIC, &mut [&mut ring], GuestAddress(0));
    ring.enable(&client, true);
    ring.serve(3);
    assert_eq!(counted(&address, "vhost_resubmitted_total"), 3);
    wait_until("unlogged pages are counted", || counted(&address, "vhost_unlogged_pages_total") > 0);
}

/// Idle connections to the metrics address use up no descriptors of front-ends, and do not fill the error output.
#[rstest]
fn idle_metrics_connections_do_not_block_front_ends(#[values("tcp", "unix")] kind: &str) {
    let folder = tempfile::tempdir().unwrap();
    let image = disk_options(folder.path(), 1 << 20, |_| {}).image;
    let address = match kind {
        "tcp" => TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string(),
        _ => folder.path().join("metrics").to_str().unwrap().to_owned(),
    };
    let socket = folder.path().join("s");
    let mut process = Process::start(&socket, &image, &["--metrics", &format!("{kind}:{address}"), "--queues", "2"]);
    process.limit_fds(100);
    let connect = || -> Box<dyn std::any::Any> {
        match kind {
            "tcp" => Box::new(TcpStream::connect(&address).unwrap()),
            _ => {
                let socket =
                    nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None);
                let socket = socket.unwrap();
                // The backlog of the listening socket may be full.
                let _ = nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(address.as_str()).unwrap());
                Box::new(socket)
            }
        }
    };
    let idle: Vec<_> = (0..120).map(|_| connect()).collect();
    let (guest, client) = (Guest::new(), RawFrontend::connect(&socket));
    negotiate(&client, &guest, BASIC);
    let mut ring = Ring::started(&client, &guest, 0, 256, BASIC);
    assert_ring_works(&guest, &mut ring);
    assert!(process.open_fds() < 60, "{}", process.open_fds());
    drop(idle);
    if kind == "tcp" {
        assert!(counted(&address, "vhost_connections_total") > 0);
    }
    process.child.kill().unwrap();
    let said = process.stderr();
    assert!(said.len() < 1000, "{said}");
}
