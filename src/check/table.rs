//! The checks in the order of their execution, with their rules, rings and needs.

use super::options::CheckOptions;
use super::outcome::{CheckAbort, Outcome};
use super::ring_variant::RingSelection::{self, All, AllPacked, AllSplit, Data, DataOrMain, Main, Once};
use super::ring_variant::RingVariant;
use super::rules::Rule;
use super::target::Target;
use super::{
    backend_channel, blk, framing, hostile, inflight, iommu, log, marks, memory, order, postcopy, rings, state,
};

type Run = fn(&mut Target) -> Result<Outcome, CheckAbort>;

/// Permission that a check needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Permission {
    None,
    /// `CheckOptions::may_kill`, or an option that implies it: some back-ends do not survive the check.
    MayKill,
    /// `CheckOptions::hostile`: the check sends messages that must be refused.
    Hostile,
}

impl Permission {
    /// Returns the reason why a check without this permission is not run.
    pub(super) fn missing(self, options: &CheckOptions) -> Option<&'static str> {
        match self {
            Permission::MayKill if !options.may_kill && !options.hostile && options.restart.is_none() => {
                Some("needs --may-kill: some back-ends do not survive it")
            }
            Permission::Hostile if !options.hostile => Some("needs --hostile"),
            _ => None,
        }
    }
}

/// A check of one rule.
pub(super) struct Check {
    rule: Rule,
    /// Rule that is checked on packed rings, if another one.
    packed_rule: Rule,
    pub(super) what: &'static str,
    pub(super) run_on: RingSelection,
    pub(super) needs: Permission,
    pub(super) run: Run,
}

impl Check {
    const fn new(rule: Rule, what: &'static str, run_on: RingSelection, run: Run) -> Check {
        Check { rule, packed_rule: rule, what, run_on, needs: Permission::None, run }
    }

    const fn on_packed(self, packed_rule: Rule) -> Check {
        Check { packed_rule, ..self }
    }

    const fn may_kill(self) -> Check {
        Check { needs: Permission::MayKill, ..self }
    }

    const fn hostile(self) -> Check {
        Check { needs: Permission::Hostile, ..self }
    }

    /// Returns the rule that is checked on these rings.
    pub(super) fn rule_on(&self, variant: Option<RingVariant>) -> Rule {
        if variant.is_some_and(|variant| variant.packed) { self.packed_rule } else { self.rule }
    }
}

/// All checks, in the order of their execution.
pub(super) const CHECKS: &[Check] = &[
    Check::new(Rule::F1, "header and payload in separate segments are accepted", Once, framing::segments),
    Check::new(Rule::F2, "replies of all kinds have the flags 0x5", Once, framing::reply_flags),
    Check::new(Rule::F3, "need-reply adds no second reply; replies have the specified lengths", Once, framing::replies),
    Check::new(Rule::F4, "need-reply is acknowledged with a u64, 0 for success", Once, framing::acknowledgements),
    Check::new(Rule::F4, "messages are processed strictly in order", Once, framing::message_order),
    Check::new(
        Rule::F5,
        "an unknown request with need-reply is refused and the connection continues",
        Once,
        framing::unknown_with_need_reply,
    ),
    Check::new(Rule::F5, "an unknown request without need-reply is ignored", Once, framing::unknown_without_need_reply),
    Check::new(Rule::F6, "a memory table with padding is accepted", Once, framing::padded_memory_table),
    Check::new(Rule::F8, "a socket as call fd is written with 8 bytes", Main, framing::socket_as_call_fd),
    Check::new(Rule::C1, "GET_CONFIG echoes offset and size, and parts match the whole", Once, blk::config),
    Check::new(Rule::R3, "writes accepted before GET_VRING_BASE are on the disk", Once, blk::writes_before_stop),
    Check::new(
        Rule::I9,
        "writes of a killed back-end do not overwrite those of its successor",
        Once,
        blk::writes_after_kill,
    ),
    Check::new(Rule::R1, "features that were not offered are refused", Once, rings::unoffered_features),
    Check::new(Rule::R1, "without bit 30 a ring runs as soon as it is started", Main, rings::without_protocol_features),
    Check::new(Rule::R2, "a ring that is not enabled is not served", All, rings::disabled_ring),
    Check::new(Rule::R2, "pending requests are served when the ring is enabled", All, rings::enabled_ring),
    Check::new(
        Rule::R3,
        "GET_VRING_BASE completes and publishes all accepted requests, and no write follows it",
        All,
        rings::drain,
    ),
    Check::new(
        Rule::R3,
        "all rings at once: their writes are marked, and each is drained",
        All,
        rings::drain_all_rings,
    ),
    Check::new(
        Rule::R4,
        "a ring continues at its base, also across the wrap of the index",
        All,
        rings::continue_at_base,
    ),
    Check::new(Rule::R5, "SET_VRING_ADDR on a running ring does not change its position", All, rings::set_vring_addr),
    Check::new(Rule::R9, "the next front-end is served, and the device is unchanged", Main, rings::next_front_end),
    Check::new(Rule::R6, "a ring started in QEMU's order runs", Main, order::qemu_start_order),
    Check::new(
        Rule::R7,
        "a ring started in UML's order runs, and stops when it is disabled",
        Main,
        order::uml_start_order,
    ),
    Check::new(Rule::R8, "RESET_OWNER has no effect on later use", Once, order::reset_owner),
    Check::new(Rule::R8, "RESET_DEVICE disables rings, which can be started again", Main, order::reset_device),
    Check::new(Rule::R8, "SET_STATUS 0 disables rings, which can be started again", Main, order::reset_status),
    Check::new(Rule::R10, "completions without a call fd are signalled on the next call fd", All, order::late_call_fd),
    Check::new(Rule::F7, "SET_LOG_BASE is answered once", Once, log::set_log_base_reply),
    Check::new(Rule::L1, "every page that a request changed is marked", Data, log::data_marks),
    Check::new(Rule::L2, "a log with an offset and an odd size is used correctly", Data, log::log_at_offset),
    Check::new(Rule::L3, "the used ring is marked at log_guest_addr", AllSplit, log::used_ring_marks),
    Check::new(Rule::L3, "data follows LOG_ALL, the used ring follows F_LOG", AllSplit, log::logging_switches),
    Check::new(Rule::L3, "the avail event word is marked at log_guest_addr", AllSplit, log::avail_event_marks),
    Check::new(Rule::L4, "used descriptors are marked where the ring lies", AllPacked, log::descriptor_marks),
    Check::new(Rule::L4, "the event area is marked at log_guest_addr", AllPacked, log::event_area_marks),
    Check::new(
        Rule::L7,
        "nothing is marked before logging is on, nor after it is off",
        DataOrMain,
        log::no_marks_while_off,
    ),
    Check::new(
        Rule::L8,
        "no page is lost when QEMU reconnects while logging",
        DataOrMain,
        log::reconnect_while_logging,
    ),
    Check::new(
        Rule::L9,
        "a log is replaced under load: no page is lost, the old log gets no marks",
        Data,
        log::replaced_log,
    ),
    Check::new(Rule::L12, "SET_LOG_FD is signalled after logging, and only then", DataOrMain, log::log_fd_signals),
    Check::new(Rule::L10, "data is marked before its completion is seen", Data, marks::mark_order),
    Check::new(Rule::L11, "marks of concurrent writers in the same words are not lost", Data, marks::concurrent_marks),
    Check::new(
        Rule::L15,
        "a continued ring with an empty log: its writes are marked, and all guest memory",
        Main,
        marks::successor_marks,
    ),
    Check::new(Rule::M1, "there are enough memory slots", Once, memory::slot_count),
    Check::new(
        Rule::M1,
        "a region is added and removed under load, and writes to it are marked",
        Data,
        memory::added_region,
    ),
    Check::new(Rule::L9, "a repeated memory table under load: no page is lost", Data, memory::repeated_memory_table),
    Check::new(Rule::I1, "GET_INFLIGHT_FD returns a region of sufficient size", Main, inflight::region_size),
    Check::new(
        Rule::I2,
        "requests are marked while in flight, and the region of a stopped ring is consistent",
        Main,
        inflight::region_contents,
    )
    .on_packed(Rule::I4),
    Check::new(
        Rule::I3,
        "requests in flight at a disconnection complete exactly once on the next connection",
        Main,
        inflight::hang_ups,
    )
    .on_packed(Rule::I4),
    Check::new(
        Rule::I3,
        "requests in flight at a SIGKILL complete exactly once after the restart",
        Main,
        inflight::kills,
    )
    .on_packed(Rule::I4),
    Check::new(Rule::I5, "a fresh region on a used ring starts at the ring's used index", Main, inflight::fresh_region),
    Check::new(Rule::I6, "request counters keep increasing", Main, inflight::request_counters),
    Check::new(Rule::I8, "requests in flight can migrate instead of being drained", Once, inflight::inflight_migration),
    Check::new(Rule::I7, "RESET_DEVICE resets the region", Main, inflight::region_after_reset),
    Check::new(
        Rule::T1,
        "every address is translated, and unknown translations are requested",
        All,
        iommu::translations,
    ),
    Check::new(Rule::T1, "denied pages are not accessed, and break one ring at most", All, iommu::denied_pages),
    Check::new(
        Rule::T1,
        "GET_VRING_BASE is answered while a translation is outstanding",
        All,
        iommu::outstanding_translation,
    ),
    Check::new(Rule::T2, "invalid IOTLB messages have no effect", Main, iommu::invalid_iotlb_messages),
    Check::new(
        Rule::T3,
        "data is moved under load: the old pages are not accessed after the acknowledgement",
        Data,
        iommu::moved_data,
    ),
    Check::new(Rule::T3, "a ring continues after it is moved", All, iommu::moved_ring),
    Check::new(Rule::T4, "a ring with scattered pages runs", All, iommu::scattered_ring),
    Check::new(Rule::T5, "ACCESS_PLATFORM is offered", Once, iommu::access_platform_offered),
    Check::new(
        Rule::L5,
        "guest-physical pages are marked, and log_guest_addr is translated",
        All,
        iommu::guest_physical_marks,
    ),
    Check::new(Rule::D1, "the state of a device that never ran can be saved", Once, state::state_before_start),
    Check::new(
        Rule::D1,
        "the state of a stopped device can be loaded on the next connection",
        Main,
        state::state_of_stopped_device,
    ),
    Check::new(Rule::D1, "a truncated state is refused without effect", Once, state::truncated_states),
    Check::new(Rule::D1, "invalid directions and phases are refused", Once, state::invalid_directions),
    Check::new(Rule::D1, "messages are answered during a state transfer", Once, state::messages_during_transfer),
    Check::new(Rule::B1, "a second SET_BACKEND_REQ_FD replaces the channel", Once, backend_channel::replaced_channel),
    Check::new(
        Rule::B1,
        "a closed channel, or noise on it, affects neither rings nor connection",
        Once,
        backend_channel::lost_channel,
    ),
    Check::new(Rule::B1, "an unread channel does not stall rings", Once, backend_channel::unread_channel),
    Check::new(Rule::B3, "in-band kicks and calls work", Main, backend_channel::in_band_notifications),
    Check::new(
        Rule::B3,
        "an in-band kick starts a ring without SET_VRING_KICK and SET_VRING_CALL",
        Main,
        backend_channel::kick_without_vring_kick,
    ),
    Check::new(Rule::F3, "need-reply adds no second reply in postcopy", Once, postcopy::need_reply_in_postcopy),
    Check::new(Rule::M1, "postcopy is not offered together with memory slots", Once, postcopy::no_memory_slots),
    Check::new(
        Rule::P1,
        "the reply to POSTCOPY_ADVISE is one userfaultfd and no payload",
        Once,
        postcopy::postcopy_advise_reply,
    ),
    Check::new(
        Rule::P1,
        "pages can be placed at the addresses in the reply to the postcopy memory table",
        Once,
        postcopy::memory_table_addresses,
    ),
    Check::new(
        Rule::P1,
        "requests in missing memory are served as its pages arrive",
        All,
        postcopy::requests_in_missing_memory,
    ),
    Check::new(Rule::P1, "POSTCOPY_LISTEN without POSTCOPY_ADVISE is refused", Once, postcopy::listen_without_advise),
    Check::new(Rule::P1, "POSTCOPY_ADVISE without PAGEFAULT is refused", Once, postcopy::advise_without_pagefault),
    Check::new(Rule::L6, "writes to pages outside the log are survived", DataOrMain, log::log_too_small).may_kill(),
    Check::new(
        Rule::P1,
        "a disconnection before POSTCOPY_END has no effect on later front-ends",
        Once,
        postcopy::hang_ups,
    )
    .may_kill(),
    Check::new(Rule::F1, "hostile: invalid headers and truncated messages", Once, hostile::invalid_headers).hostile(),
    Check::new(Rule::F6, "hostile: payloads truncated to 3 bytes", Once, hostile::truncated_payloads).hostile(),
    Check::new(Rule::M1, "hostile: invalid memory tables", Once, hostile::memory_tables).hostile(),
    Check::new(Rule::R2, "hostile: invalid ring parameters", Once, hostile::ring_parameters).hostile(),
    Check::new(Rule::L2, "hostile: invalid logs", Once, hostile::logs).hostile(),
    Check::new(Rule::C1, "hostile: invalid configuration ranges", Once, hostile::configuration_ranges).hostile(),
    Check::new(Rule::D1, "hostile: mutated device states", Once, state::mutated_states).hostile(),
    Check::new(Rule::I1, "hostile: invalid inflight regions", Once, hostile::inflight_regions).hostile(),
    Check::new(Rule::I3, "hostile: inflight regions filled with noise", Main, hostile::inflight_noise)
        .on_packed(Rule::I4)
        .hostile(),
    Check::new(Rule::R9, "hostile: invalid descriptors", Main, hostile::invalid_descriptors).hostile(),
];
