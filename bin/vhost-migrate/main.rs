//! The command: parses arguments and hands them to the file of the subcommand.

mod backend;
mod check;
mod demo;
mod dirty_rate;
mod guest;
mod inspect;
mod interrupt;
mod messages;
mod metrics;
mod migrate;
mod progress;
mod units;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Live migration, dirty logging and crash-resume for vhost devices
#[derive(Debug, Parser)]
#[command(version)]
struct Command {
    #[command(subcommand)]
    action: Action,
    /// End when the process that started this one ends
    #[arg(long, global = true, hide = true)]
    exit_with_parent: bool,
}

#[derive(Debug, Subcommand)]
enum Action {
    Demo(demo::Arguments),
    Backend(backend::Arguments),
    Guest(guest::Arguments),
    Migrate(migrate::Arguments),
    DirtyRate(dirty_rate::Arguments),
    Inspect(inspect::Arguments),
    Check(check::Arguments),
}

fn main() -> ExitCode {
    let command = Command::parse();
    if command.exit_with_parent
        && let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
    {
        eprintln!("vhost-migrate: --exit-with-parent: {error}");
        return ExitCode::FAILURE;
    }
    match command.action {
        Action::Demo(arguments) => demo::run(arguments),
        Action::Backend(arguments) => backend::run(arguments),
        Action::Guest(arguments) => guest::run(arguments),
        Action::Migrate(arguments) => migrate::run(arguments),
        Action::DirtyRate(arguments) => dirty_rate::run(arguments),
        Action::Inspect(arguments) => inspect::run(arguments),
        Action::Check(arguments) => check::run(arguments),
    }
}
