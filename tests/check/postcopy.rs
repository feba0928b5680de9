//! Faults of postcopy (rule P1). All of these back-ends offer it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::sys::eventfd::EventFd;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, Header, ProtocolFeatures};
use vhost_migrate::unstable::backend::VhostUserMessage;
use zerocopy::IntoBytes;

use crate::fault::Fault;

/// Bytes of an acknowledgement, and offset of a reply's payload.
const NUMBER: usize = 8;
const HEADER: usize = size_of::<Header>();
const SLOTS: ProtocolFeatures = ProtocolFeatures::CONFIGURE_MEM_SLOTS;

/// A fault in postcopy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PostcopyFault {
    None,
    /// Also offers memory slots.
    OffersSlots,
    /// Has no userfaultfd.
    NoUserfaultfd,
    /// Sends an fd that is not a userfaultfd.
    WrongFd,
    /// Replies to POSTCOPY_ADVISE with an fd without PAGEFAULT.
    AdvisesWithoutFeature,
    /// Accepts POSTCOPY_LISTEN without POSTCOPY_ADVISE.
    ListensWithoutAdvise,
    /// Replies to a memory table with the addresses of the front-end.
    EchoesAddresses,
    /// Sends a second reply to a memory table with need-reply.
    SendsSecondReply,
    /// Replies to the acknowledgement of a memory table with need-reply.
    RepliesToAcknowledgement,
    /// Writes to a page before it has arrived.
    TouchesPagesEarly,
    /// Does not run rings before POSTCOPY_END.
    StopsRingsUntilEnd,
    /// Refuses POSTCOPY_END.
    RefusesEnd,
    /// Exits if the front-end disconnects before POSTCOPY_END.
    DiesOfHangUp,
    /// Creates pages if the front-end disconnects before POSTCOPY_END.
    MakesUpPages,
}

/// State of one connection.
pub(crate) struct Postcopy {
    fault: Option<PostcopyFault>,
    agreed: bool,
    advised: bool,
    listening: bool,
    /// Files of the memory table; the last holds data.
    memory: Vec<File>,
}

impl Postcopy {
    pub(crate) fn new(fault: Fault) -> Postcopy {
        let fault = if let Fault::Postcopy(fault) = fault { Some(fault) } else { None };
        Postcopy { fault, agreed: false, advised: false, listening: false, memory: Vec::new() }
    }

    /// Records and changes a message. Returns the reply if the session must not handle the message.
    pub(crate) fn message(&mut self, message: &mut VhostUserMessage) -> Option<(Vec<u8>, Option<OwnedFd>)> {
        let (fault, code) = (self.fault?, message.code);
        match code {
            Code::SET_PROTOCOL_FEATURES => {
                let bits = ProtocolFeatures::from_bits_retain(u64::from_ne_bytes(*message.payload.first_chunk()?));
                self.agreed = bits.contains(ProtocolFeatures::PAGEFAULT);
                if fault == PostcopyFault::OffersSlots {
                    message.payload = (bits & !SLOTS).as_bytes().to_vec();
                }
            }
            Code::POSTCOPY_END => self.listening = false,
            Code::SET_MEM_TABLE if !message.fds.is_empty() => {
                self.memory = message.fds.iter().map(|fd| fd.try_clone().unwrap().into()).collect();
                if self.listening && fault == PostcopyFault::TouchesPagesEarly {
                    self.touch();
                }
            }
            _ => {}
        }
        match (fault, code) {
            (PostcopyFault::AdvisesWithoutFeature, Code::POSTCOPY_ADVISE) if !self.agreed => {
                let header = Header { request: code.0, flags: 5, size: 0 };
                Some((header.as_bytes().to_vec(), Some(EventFd::new().unwrap().into())))
            }
            (PostcopyFault::StopsRingsUntilEnd, Code::SET_VRING_KICK) if self.listening => {
                Some((number(code, 0), None))
            }
            _ => None,
        }
    }

    /// Changes the reply of the session.
    pub(crate) fn reply(&mut self, code: Code, payload: &[u8], bytes: &mut Vec<u8>, fd: &mut Option<OwnedFd>) {
        match (self.fault, code) {
            (Some(PostcopyFault::OffersSlots), Code::GET_PROTOCOL_FEATURES) => {
                bytes[HEADER + 1] |= (SLOTS.bits() >> 8) as u8
            }
            (Some(PostcopyFault::NoUserfaultfd), Code::POSTCOPY_ADVISE) => *fd = None,
            (Some(PostcopyFault::WrongFd), Code::POSTCOPY_ADVISE) => *fd = Some(EventFd::new().unwrap().into()),
            (Some(PostcopyFault::ListensWithoutAdvise), Code::POSTCOPY_LISTEN) if !self.advised => {
                *bytes = number(code, 0)
            }
            (Some(PostcopyFault::RefusesEnd), Code::POSTCOPY_END) => *bytes = number(code, 1),
            (Some(PostcopyFault::EchoesAddresses), Code::SET_MEM_TABLE) if bytes.len() > HEADER + NUMBER => {
                bytes.splice(HEADER.., payload.iter().copied());
            }
            _ => {}
        }
        self.advised |= code == Code::POSTCOPY_ADVISE;
        self.listening |= code == Code::POSTCOPY_LISTEN && self.advised;
    }

    /// Returns a further reply to a message with these flags.
    pub(crate) fn more(&self, code: Code, flags: u32, payload: &[u8]) -> Option<Vec<u8>> {
        let of_table = code == Code::SET_MEM_TABLE && self.listening && flags & Header::FLAG_NEED_REPLY != 0;
        let is_acknowledgement = payload.len() == NUMBER;
        match self.fault? {
            PostcopyFault::SendsSecondReply => of_table && !is_acknowledgement,
            PostcopyFault::RepliesToAcknowledgement => of_table && is_acknowledgement,
            _ => false,
        }
        .then(|| number(code, 0))
    }

    /// Handles a disconnection. Returns true if the process is to exit.
    pub(crate) fn hung_up(&self) -> bool {
        if self.listening && self.fault == Some(PostcopyFault::MakesUpPages) {
            self.touch();
        }
        self.listening && self.fault == Some(PostcopyFault::DiesOfHangUp)
    }

    /// Creates the first page of data.
    fn touch(&self) {
        self.memory.last().into_iter().for_each(|data| data.write_all_at(&[0], 0).unwrap());
    }
}

/// Builds a reply with a u64.
fn number(code: Code, number: u64) -> Vec<u8> {
    let header = Header { request: code.0, flags: 5, size: NUMBER as u32 };
    [header.as_bytes(), number.as_bytes()].concat()
}
