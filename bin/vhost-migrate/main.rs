//! The command: parses the arguments and calls the module of the subcommand.

mod backend;
mod check;
mod demo;
mod dirty_rate;
mod guest;
mod inspect;
mod log_arguments;
mod metrics;
mod migrate;
mod progress;
mod resume_forget;
mod signals;
mod units;
mod values;

use std::fmt::Display;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use vhost_migrate::control;

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
    /// Resume a paused guest; after a migration of unknown outcome, assert that the destination does not run it
    #[command(
        after_help = "After a migration whose outcome is not known (exit status 3 of migrate), the source keeps its guest
paused. Resume it only if you know that the destination does not run it and never will: its process has ended, or says
so. The destination is asked first, if it can be reached; one that has the guest is believed.

Exit status: 0 the guest runs; 1 it does not, and why; 2 wrong arguments."
    )]
    Resume(resume_forget::Arguments),
    /// Release a guest after a migration of unknown outcome, and assert that the destination runs it
    #[command(
        after_help = "After a migration whose outcome is not known (exit status 3 of migrate), the source keeps its guest
paused. Forget it only if you know that the destination runs it, or that a complete file has it: it ends here.

Exit status: 0 the guest is gone from here; 1 it is not, and why; 2 wrong arguments."
    )]
    Forget(resume_forget::Arguments),
    DirtyRate(dirty_rate::Arguments),
    Inspect(inspect::Arguments),
    Check(check::Arguments),
}

/// Reports an invalid combination of arguments as the command line parser does, and exits with status 2.
fn wrong_arguments(why: impl Display) -> ! {
    Command::command().error(ErrorKind::ValueValidation, why).exit()
}

fn main() -> ExitCode {
    let command = Command::parse();
    if command.exit_with_parent
        && let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
    {
        eprintln!("vhost-migrate: --exit-with-parent: {error}");
        return ExitCode::FAILURE;
    }
    if let Err(error) = signals::block_file_size_signal() {
        eprintln!("vhost-migrate: signals: {error}");
        return ExitCode::FAILURE;
    }
    match command.action {
        Action::Demo(arguments) => demo::run(arguments),
        Action::Backend(arguments) => backend::run(arguments),
        Action::Guest(arguments) => guest::run(arguments),
        Action::Migrate(arguments) => migrate::run(arguments),
        Action::Resume(arguments) => resume_forget::run(&arguments, &control::ControlCommand::Resume {}),
        Action::Forget(arguments) => resume_forget::run(&arguments, &control::ControlCommand::Forget {}),
        Action::DirtyRate(arguments) => dirty_rate::run(arguments),
        Action::Inspect(arguments) => inspect::run(arguments),
        Action::Check(arguments) => check::run(arguments),
    }
}
