//! The network interface over VDUSE, as an interface of this host: the kernel's virtio_net uses it through virtio_vdpa.

use std::fs;
use std::thread;

use rstest::rstest;

use crate::tap::{Interface, frame};
use crate::vduse::{Served, driver, refused};
use crate::wait::wait_until;

/// Serves an interface on the tap `tap`, attached to virtio_vdpa.
fn serve(name: &str, tap: &str, more: &[&str]) -> Served {
    let arguments = ["--attach", "virtio", "--tap", tap, "--mac", "52:54:00:00:00:07"];
    Served::start("net", name, &[&arguments, more].concat())
}

/// Returns the interface that the driver offers.
fn interface(served: &Served) -> String {
    let name = served.line.split("(interface ").nth(1).expect("an interface in parentheses");
    name.trim_end().trim_end_matches(')').into()
}

/// Rules V2.2, V2.3: frames pass in both directions, with both kinds of rings. The control queue is left out, which the
/// kernel refuses.
#[rstest]
fn frames_pass_in_both_directions(#[values(&[], &["--split-rings"], &["--queue-pairs", "2"])] more: &[&str]) {
    let served = serve("frames", "vdtap0", more);
    assert!(served.log().contains("drivers are not offered, "), "{}", served.log());
    assert!(served.log().contains("VIRTIO_NET_F_CTRL_VQ"), "{}", served.log());
    let name = interface(&served);
    let address = fs::read_to_string(format!("/sys/class/net/{name}/address")).unwrap();
    assert_eq!(address.trim(), "52:54:00:00:00:07");
    let (driver, peer) = (Interface::new(&name), Interface::new("vdtap0"));
    for round in 0..200_u32 {
        let payload = round.to_le_bytes().repeat(1 + 300 * (round as usize % 2));
        driver.send(&payload);
        assert_eq!(peer.receive()[..], frame(&payload)[..], "to the tap, {round}");
        peer.send(&payload);
        assert_eq!(driver.receive()[..], frame(&payload)[..], "from the tap, {round}");
    }
    served.end();
}

#[test]
fn an_interface_can_be_unbound_under_load_and_bound_again() {
    let served = serve("unplug", "vdtap1", &[]);
    let (name, peer) = (interface(&served), Interface::new("vdtap1"));
    let own = Interface::new(&name);
    thread::scope(|scope| {
        let load = scope.spawn(|| (0..2000).for_each(|_| peer.send(&[7; 1000])));
        own.receive();
        driver("virtio_vdpa", "unbind", "unplug");
        load.join().unwrap();
    });
    driver("virtio_vdpa", "bind", "unplug");
    let path = format!("/sys/class/net/{name}");
    wait_until("the interface is there again", || fs::exists(&path).unwrap());
    let own = Interface::new(&name);
    own.send(&[9; 100]);
    while peer.receive() != frame(&[9; 100]) {}
    served.end();
}

/// Rules V3.3, V3.5: the same command continues the interface, and another one replaces it if that is asked for.
#[rstest]
fn an_interface_left_behind_is_continued_or_replaced(#[values(&[], &["--split-rings"])] more: &[&str]) {
    let served = serve("dead", "vdtap2", more);
    let own = Interface::new(&interface(&served));
    let exchange = |payload: &[u8]| {
        let peer = Interface::new("vdtap2");
        own.send(payload);
        while peer.receive() != frame(payload) {}
        peer.send(payload);
        while own.receive() != frame(payload) {}
    };
    exchange(&[1; 60]);
    served.kill();
    own.send(&[2; 60]);
    let served = serve("dead", "vdtap2", more);
    exchange(&[3; 60]);
    served.kill();

    let other = [more, &["--queue-size", "256"]].concat();
    let arguments = [&["--attach", "virtio", "--tap", "vdtap2"], &other[..]].concat();
    let error = refused("net", "dead", &arguments);
    assert!(error.contains("--replace"), "{error}");
    let served = serve("dead", "vdtap2", &[&other[..], &["--replace"]].concat());
    let (own, peer) = (Interface::new(&interface(&served)), Interface::new("vdtap2"));
    own.send(&[4; 60]);
    assert_eq!(peer.receive(), frame(&[4; 60]));
    served.end();
}
