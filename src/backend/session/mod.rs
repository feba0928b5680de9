//! Protocol state machine of a connection, without sockets and threads.
//!
//! [`Session::handle_message`] processes one message, controls the rings through [`VringController`] (the workers,
//! outside of tests) and returns the reply. Front-ends set up rings in different orders (rules R6, R7, L8): the session
//! keeps the state as given, and a ring runs as soon as it is started, enabled and complete (rule R6.4).
//!
//! | file | purpose |
//! |---|---|
//! | `message`, `replies` | decoding of a message; encoding of replies, and replies that are sent together |
//! | `commands` | what the session asks of the rings |
//! | `memory`, `postcopy` | guest memory, and memory whose pages arrive while rings run |
//! | `log` | the dirty log |
//! | `ring`, `kick`, `notify` | setup of a ring, and its kick, call and error descriptors |
//! | `device`, `transfer` | configuration, inflight region, and the device state through a pipe |
//! | `backend_channel` | requests to the front-end over the socket of SET_BACKEND_REQ_FD |
//! | `direct` | front-ends that are reached by calls instead |

#![forbid(unsafe_code)]

mod backend_channel;
mod commands;
mod device;
mod direct;
mod kick;
mod log;
mod memory;
mod message;
mod notify;
mod postcopy;
pub(super) mod replies;
mod ring;
mod transfer;

pub use backend_channel::FrontendHandle;
pub use commands::{Logging, VringConfig, VringController};
#[cfg(feature = "vduse")]
pub(crate) use direct::DirectFrontend;
pub use kick::Kick;
pub use message::{MAX_FDS, VhostUserMessage, VhostUserReply};
pub use notify::Notifier;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tracing::debug;

use crate::abi::vhost_user::{
    ConfigHeader, DEVICE_STATE_NOFD_MASK, FrontendRequest as Code, Header, MemRegMsg, ProtocolFeatures,
    VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_MAX_RAM_SLOTS, VringState, own,
};
use crate::abi::virtio::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VirtioFeatures};
use crate::backend::{BackendError, VirtioDevice, counters};
use crate::dirty::{Log, LogSignal};
use crate::inflight;
use crate::memory::{Iotlb, Memory};
use crate::ring::RingBase;
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;
use backend_channel::{BackendChannel, check_socket};
use device::config_bytes;
use memory::regions_of;
use postcopy::{Postcopy, reply_payload};
use ring::SessionRing;
use transfer::StateTransfer;

/// Protocol features offered with every device.
const PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::BACKEND_SEND_FD)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::INBAND_NOTIFICATIONS)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// Protocol features that INBAND_NOTIFICATIONS requires (rule B3.1).
const INBAND_REQUIREMENTS: ProtocolFeatures = ProtocolFeatures::BACKEND_REQ.union(ProtocolFeatures::REPLY_ACK);

/// The action that follows a message.
#[derive(Debug)]
pub enum MessageOutcome {
    /// No reply is due.
    NoReply,
    /// A reply is to be sent.
    Reply(VhostUserReply),
    /// The connection is to be closed, because the front-end waits for a reply that cannot be given.
    Close(BackendError),
}

/// The protocol state of one connection.
pub struct Session {
    device: Arc<dyn VirtioDevice>,
    features: VirtioFeatures,
    protocol_features: ProtocolFeatures,
    status: u64,
    memory: Memory,
    log: Option<Arc<Log>>,
    log_signal: Option<Arc<LogSignal>>,
    out_of_range_pages: Arc<AtomicU64>,
    /// A ring has run while logging was wanted and there was no log (rule L8.3).
    unlogged: bool,
    /// Work of the device while logging is enabled, to be stopped faster.
    stop_preparation: Option<Box<dyn Send>>,
    inflight: Option<Arc<inflight::InflightRegion>>,
    rings: Vec<SessionRing>,
    postcopy: Postcopy,
    /// The current transfer of device state.
    transfer: Option<StateTransfer>,
    iotlb: Arc<Iotlb>,
    frontend: Arc<FrontendHandle>,
    /// The back-end channel, after SET_BACKEND_REQ_FD.
    backend_channel: Option<BackendChannel>,
}

impl Session {
    /// Creates the session of a new connection: nothing is acknowledged, all rings are stopped and disabled.
    pub fn new(device: Arc<dyn VirtioDevice>) -> Session {
        let rings = (0..device.queues()).map(|_| SessionRing::default()).collect();
        let frontend = Arc::new(FrontendHandle::default());
        device.connected(frontend.clone());
        Session {
            device,
            features: VirtioFeatures::empty(),
            protocol_features: ProtocolFeatures::empty(),
            status: 0,
            memory: Memory::default(),
            log: None,
            log_signal: None,
            out_of_range_pages: Arc::default(),
            unlogged: false,
            stop_preparation: None,
            inflight: None,
            rings,
            postcopy: Postcopy::default(),
            transfer: None,
            iotlb: Arc::default(),
            frontend,
            backend_channel: None,
        }
    }

    /// Processes a message and returns the action that follows. A message refused for its contents changes nothing.
    pub fn handle_message(&mut self, message: VhostUserMessage, rings: &mut dyn VringController) -> MessageOutcome {
        let code = message.code;
        debug!(
            "{code}: {} bytes, {} fds{}",
            message.payload.len(),
            message.fds.len(),
            if message.flags & Header::FLAG_NEED_REPLY != 0 { ", wants a reply" } else { "" }
        );
        if self.postcopy.awaits_acknowledgement() {
            return self
                .acknowledge_memory(&message, rings)
                .map_or_else(MessageOutcome::Close, |()| MessageOutcome::NoReply);
        }
        let asked = message.flags & Header::FLAG_NEED_REPLY != 0;
        let outcome = self.dispatch(message, rings);
        // Checked after the message, which may itself acknowledge REPLY_ACK (rule F4.2).
        let acknowledge = asked && self.has_protocol_feature(ProtocolFeatures::REPLY_ACK);
        counters::message_handled(code, outcome.is_err());
        match outcome {
            Ok(Some(reply)) => MessageOutcome::Reply(reply),
            Ok(None) if acknowledge => MessageOutcome::Reply(VhostUserReply::new(code, &0u64)),
            Ok(None) => MessageOutcome::NoReply,
            // The front-end recovers its rings from guest memory and the inflight region on the next connection.
            Err(error @ BackendError::WorkerLost { .. }) => MessageOutcome::Close(error),
            Err(error) if acknowledge => {
                limited!(warn, "{code} refused: {}", with_causes(&error));
                let states = matches!(code, Code::GET_VRING_BASE | Code::GET_VRING_BASE_SKIP_DRAIN);
                // The number would be read as a ring and its base: all bits set is neither (rule F5.4).
                MessageOutcome::Reply(VhostUserReply::new(code, &if states { u64::MAX } else { 1 }))
            }
            Err(error) if self.has_own_reply(code) => MessageOutcome::Close(error),
            Err(error) => {
                limited!(warn, "{code} refused: {}", with_causes(&error));
                MessageOutcome::NoReply
            }
        }
    }

    fn has_protocol_feature(&self, feature: ProtocolFeatures) -> bool {
        self.protocol_features.contains(feature)
    }

    /// Returns true if the request has a reply of its own (rule F3.1).
    fn has_own_reply(&self, code: Code) -> bool {
        match code {
            Code::SET_LOG_BASE => self.has_protocol_feature(ProtocolFeatures::LOG_SHMFD),
            Code::SET_MEM_TABLE => self.postcopy.is_listening(),
            Code::GET_FEATURES
            | Code::GET_PROTOCOL_FEATURES
            | Code::GET_QUEUE_NUM
            | Code::GET_VRING_BASE
            | Code::GET_CONFIG
            | Code::GET_INFLIGHT_FD
            | Code::GET_MAX_MEM_SLOTS
            | Code::GET_STATUS
            | Code::POSTCOPY_ADVISE
            | Code::POSTCOPY_LISTEN
            | Code::POSTCOPY_END
            | Code::CREATE_CRYPTO_SESSION
            | Code::GET_SHARED_OBJECT
            | Code::SET_DEVICE_STATE_FD
            | Code::CHECK_DEVICE_STATE
            | Code::GET_SHMEM_CONFIG
            | Code::GET_VRING_BASE_SKIP_DRAIN => true,
            _ => false,
        }
    }

    fn dispatch(
        &mut self,
        mut message: VhostUserMessage,
        rings: &mut dyn VringController,
    ) -> Result<Option<VhostUserReply>, BackendError> {
        let code = message.code;
        if message.flags & Header::FLAG_REPLY != 0 {
            return Err(BackendError::UnexpectedReply { code });
        }
        let number = |number: u64| Ok(Some(VhostUserReply::new(code, &number)));
        match code {
            Code::GET_FEATURES => return number(self.offered_features().bits()),
            Code::SET_FEATURES => self.set_features(message.body()?, rings)?,
            Code::GET_PROTOCOL_FEATURES => return number(self.offered_protocol_features().bits()),
            Code::SET_PROTOCOL_FEATURES => {
                let bits: ProtocolFeatures = message.body()?;
                let unknown = bits & !self.offered_protocol_features();
                if !unknown.is_empty() {
                    return Err(BackendError::UnofferedProtocolFeatures { unknown });
                }
                if bits.contains(ProtocolFeatures::INBAND_NOTIFICATIONS) && !bits.contains(INBAND_REQUIREMENTS) {
                    return Err(BackendError::InbandNotifications);
                }
                self.protocol_features = bits;
                self.frontend.set_reply_ack(self.has_protocol_feature(ProtocolFeatures::REPLY_ACK));
            }
            Code::GET_QUEUE_NUM => return number(self.device.queue_num()),
            Code::GET_MAX_MEM_SLOTS => return number(VHOST_USER_MAX_RAM_SLOTS as u64),
            Code::SET_OWNER => {}
            Code::RESET_OWNER => self.stop_and_disable_rings(rings)?,
            Code::RESET_DEVICE => self.reset(rings)?,
            Code::GET_STATUS => return number(self.status),
            Code::SET_STATUS => {
                self.status = message.body()?;
                if self.status == 0 {
                    self.reset(rings)?;
                }
            }
            Code::SET_MEM_TABLE => {
                let memory = Memory::new(regions_of(&message)?)?;
                if self.postcopy.is_listening() {
                    let payload = reply_payload(&message.payload, &memory);
                    self.postcopy.offer(memory)?;
                    return Ok(Some(VhostUserReply { code, payload, fd: None }));
                }
                self.replace_memory(memory, rings)?;
            }
            Code::POSTCOPY_ADVISE if self.has_protocol_feature(ProtocolFeatures::PAGEFAULT) => {
                // A reply without a file descriptor means refusal.
                let fd = self.postcopy.advise().map_err(|error| limited!(warn, "{}", with_causes(&error))).ok();
                return Ok(Some(VhostUserReply { code, payload: Vec::new(), fd }));
            }
            Code::POSTCOPY_LISTEN if self.has_protocol_feature(ProtocolFeatures::PAGEFAULT) => {
                let listening = self.require_all_stopped(code, "P1.3").and_then(|()| self.postcopy.listen());
                return number(status_number(listening));
            }
            Code::POSTCOPY_END if self.has_protocol_feature(ProtocolFeatures::PAGEFAULT) => {
                return number(status_number(self.postcopy.end()));
            }
            Code::ADD_MEM_REG => {
                let MemRegMsg { region, .. } = message.body()?;
                let fd = message.only_fd()?;
                self.add_region(&region, fd, rings)?;
            }
            Code::REM_MEM_REG => self.remove_region(&message.body::<MemRegMsg>()?.region, rings)?,
            Code::SET_LOG_BASE => {
                let description = message.body()?;
                self.set_log_base(&description, &message.only_fd()?, rings)?;
                // Every front-end accepts this reply, with need-reply or without (rule F7.1).
                return Ok(self
                    .has_protocol_feature(ProtocolFeatures::LOG_SHMFD)
                    .then(|| VhostUserReply::new(code, &description)));
            }
            Code::SET_LOG_FD => {
                // Without a descriptor the last one is unset (rule L12.2).
                self.log_signal = message.fds.pop().map(|fd| Arc::new(LogSignal::new(fd)));
                self.update_logging(rings);
            }
            Code::SET_VRING_NUM => self.set_size(message.body()?, rings)?,
            Code::SET_VRING_BASE => {
                let state: VringState = message.body()?;
                self.require_stopped(code, state.index, "R2.6")?.base = RingBase::from_bits(state.num);
            }
            Code::SET_VRING_ADDR => self.set_addr(message.body()?, rings)?,
            Code::SET_VRING_KICK => {
                let (index, fd) = self.ring_fd(&mut message)?;
                let kick = fd.map(|fd| self.kick(index, fd)).transpose()?;
                self.stop_ring(index, rings)?;
                if let Some(ring) = self.rings.get_mut(usize::from(index)) {
                    (ring.kick, ring.started) = (kick, true);
                }
                self.apply_ring_state(index, rings)?;
            }
            Code::SET_VRING_CALL | Code::SET_VRING_ERR => {
                let (index, fd) = self.ring_fd(&mut message)?;
                let notifier = fd.map(|fd| Arc::new(Notifier::new(fd)));
                let ring = self.ring(code, index.into())?;
                ring.call_changed |= code == Code::SET_VRING_CALL && notifier.is_some() && !ring.running;
                *(if code == Code::SET_VRING_CALL { &mut ring.call } else { &mut ring.error }) = notifier;
                if let Some(ring) = self.rings.get(usize::from(index)).filter(|ring| ring.running) {
                    let (call, error) = self.notifiers(index, ring);
                    rings.set_notifiers(index, call, error);
                }
            }
            Code::VRING_KICK if self.is_in_band() => self.kick_in_band(message.body()?, rings)?,
            Code::SET_VRING_ENABLE => {
                let state: VringState = message.body()?;
                let ring = self.ring(code, state.index)?;
                ring.enabled = state.num != 0;
                let is_tried = ring.enabled && !ring.started;
                self.apply_ring_state(state.index as u16, rings)?;
                if is_tried {
                    rings.before_blocking();
                    self.device.validate_queue().map_err(BackendError::system("serve a queue"))?;
                }
            }
            Code::GET_VRING_BASE_SKIP_DRAIN
                if !self.has_protocol_feature(ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN) =>
            {
                return Err(BackendError::Unsupported { code });
            }
            Code::GET_VRING_BASE | Code::GET_VRING_BASE_SKIP_DRAIN => {
                return Ok(Some(VhostUserReply::new(code, &self.get_vring_base(code, message.body()?, rings)?)));
            }
            Code::GET_CONFIG => return self.get_config(&message).map(Some),
            Code::SET_CONFIG => {
                let ConfigHeader { offset, size, flags } = message.body()?;
                let bytes = config_bytes(&message, offset, size)?;
                self.device.set_config(offset, bytes, flags)?;
            }
            Code::GET_INFLIGHT_FD => return Ok(Some(self.get_inflight(message.body()?))),
            Code::SET_INFLIGHT_FD => self.set_inflight(&message.body()?, &message.only_fd()?)?,
            Code::IOTLB_MSG if self.device.features().contains(VIRTIO_F_ACCESS_PLATFORM) => {
                self.handle_iotlb_msg(&message.body()?, rings)?;
            }
            Code::SET_DEVICE_STATE_FD if self.has_protocol_feature(ProtocolFeatures::DEVICE_STATE) => {
                let error = status_number(self.begin_transfer(&mut message));
                return number(error | DEVICE_STATE_NOFD_MASK);
            }
            Code::CHECK_DEVICE_STATE if self.has_protocol_feature(ProtocolFeatures::DEVICE_STATE) => {
                return number(status_number(self.check_transfer()));
            }
            own::GET_DISK_GENERATION if self.has_protocol_feature(own::F_DISK_GENERATION) => {
                return Ok(Some(self.get_generation()));
            }
            own::GET_DISK_IDENTITY if self.has_protocol_feature(own::F_DISK_GENERATION) => {
                return Ok(Some(self.get_identity()));
            }
            Code::SEND_RARP | Code::NET_SET_MTU => self.device.handle_message(code, message.body()?)?,
            Code::SET_BACKEND_REQ_FD => {
                let socket = check_socket(message.only_fd()?)?;
                // The former channel is closed first.
                self.backend_channel = None;
                self.backend_channel = Some(self.frontend.attach(socket)?);
            }
            _ => return Err(BackendError::Unsupported { code }),
        }
        Ok(None)
    }

    fn offered_features(&self) -> VirtioFeatures {
        self.device.features() | VHOST_F_LOG_ALL | VHOST_USER_F_PROTOCOL_FEATURES
    }

    /// Returns the offered protocol features. STATUS and DEVICE_STATE exclude each other: QEMU sets the status to 0,
    /// which is a reset, whenever it stops a device, and no state would be left to save.
    fn offered_protocol_features(&self) -> ProtocolFeatures {
        let mut offered = PROTOCOL_FEATURES | self.device.protocol_features();
        if self.device.state_kind().is_some() {
            offered = offered & !ProtocolFeatures::STATUS | ProtocolFeatures::DEVICE_STATE;
        }
        if self.device.features().contains(VIRTIO_F_ACCESS_PLATFORM) {
            // Rings in scattered pages have a second mapping, in which a missing page is not waited for (rules P1.1, T4.2).
            offered &= !ProtocolFeatures::PAGEFAULT;
        }
        if offered.contains(ProtocolFeatures::PAGEFAULT) {
            // Front-ends do not speak both (rule P1.1).
            offered &= !ProtocolFeatures::CONFIGURE_MEM_SLOTS;
        }
        offered
    }

    fn set_features(&mut self, bits: VirtioFeatures, rings: &mut dyn VringController) -> Result<(), BackendError> {
        let unknown = bits & !self.offered_features();
        if !unknown.is_empty() {
            return Err(BackendError::UnofferedFeatures { unknown });
        }
        // Running rings and queues use the features acknowledged at their start (rule R1.4).
        let changed = (bits ^ self.features) & !VHOST_F_LOG_ALL;
        if !changed.is_empty() && self.rings.iter().any(|ring| ring.running) {
            return Err(BackendError::FeaturesOfRunningRings { changed });
        }
        if changed.contains(VIRTIO_F_ACCESS_PLATFORM) {
            self.clear_iotlb();
        }
        self.features = bits;
        // Unlogged writes do not matter any more (rule L8.4).
        self.unlogged &= bits.contains(VHOST_F_LOG_ALL);
        self.update_logging(rings);
        self.note_unlogged();
        match self.stop_preparation.take() {
            _ if !bits.contains(VHOST_F_LOG_ALL) => {}
            None => self.stop_preparation = self.device.prepare_to_stop(),
            preparing => self.stop_preparation = preparing,
        }
        if !bits.contains(VHOST_USER_F_PROTOCOL_FEATURES) {
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
            self.apply_ring_states(rings)?;
        }
        Ok(())
    }

    fn is_translated(&self) -> bool {
        self.features.contains(VIRTIO_F_ACCESS_PLATFORM)
    }

    /// Resets the device to the state without a driver. The owner, memory and protocol features stay (rules R8.2,
    /// I7.1).
    fn reset(&mut self, rings: &mut dyn VringController) -> Result<(), BackendError> {
        self.stop_and_disable_rings(rings)?;
        self.rings.iter_mut().for_each(SessionRing::reset);
        (self.features, self.status) = (VirtioFeatures::empty(), 0);
        self.stop_preparation = None;
        self.iotlb.clear();
        self.device.reset();
        if let Some(region) = &self.inflight {
            region.reset();
        }
        Ok(())
    }

    /// Returns true if messages replace kick, call and error descriptors that are not given (rule B3.2).
    fn is_in_band(&self) -> bool {
        self.has_protocol_feature(ProtocolFeatures::INBAND_NOTIFICATIONS)
    }

    fn is_packed(&self) -> bool {
        self.features.contains(VIRTIO_F_RING_PACKED)
    }
}

/// Returns the reply number of requests that report success with 0: 1 after an error, which is logged.
fn status_number(done: Result<(), BackendError>) -> u64 {
    done.map_or_else(
        |error| {
            limited!(warn, "{}", with_causes(&error));
            1
        },
        |()| 0,
    )
}
