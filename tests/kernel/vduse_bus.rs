//! The vDPA bus from another process than the device's, as the program `vdpa` uses it.

use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use vhost_migrate::abi::vdpa::{VDPA_GENL_NAME, VDPA_GENL_VERSION};

/// The family that resolves the numbers of families, and its command and attributes.
const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// Flags: a request, and an acknowledgement is wanted.
const FLAGS: u16 = 1 | 4;
/// Bytes of both headers.
const HEADERS: usize = 20;

/// Sends a command to the vDPA bus, and checks that it is executed.
pub(crate) fn bus_command(command: u8, strings: &[(u16, &str)]) {
    let reply = request(CONTROL, GET_FAMILY, 2, &[(FAMILY_NAME, VDPA_GENL_NAME)]);
    let mut attributes = &reply[HEADERS..];
    let family = loop {
        let number = |at| u16::from_ne_bytes([attributes[at], attributes[at + 1]]);
        if number(2) == FAMILY_ID {
            break number(4);
        }
        attributes = &attributes[usize::from(number(0)).next_multiple_of(4)..];
    };
    let reply = request(family, command, VDPA_GENL_VERSION, strings);
    assert_eq!(reply[16..20], [0; 4], "the error of command {command}");
}

/// Sends a request with string attributes, and returns the first message of the reply.
fn request(family: u16, command: u8, version: u8, strings: &[(u16, &str)]) -> Vec<u8> {
    let mut body = vec![command, version, 0, 0];
    for (kind, text) in strings {
        body.extend((5 + text.len() as u16).to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(text.bytes());
        body.resize((body.len() + 1).next_multiple_of(4), 0);
    }
    let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
    message.extend([family.to_ne_bytes(), FLAGS.to_ne_bytes()].concat());
    message.extend([0; 8]);
    message.extend(body);
    let protocol = SockProtocol::NetlinkGeneric;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
    send(socket.as_raw_fd(), &message, MsgFlags::empty()).unwrap();
    let mut reply = vec![0; 8192];
    let len = recv(socket.as_raw_fd(), &mut reply, MsgFlags::empty()).unwrap();
    reply.truncate(len);
    reply
}
