//! The harness that the suites share: a server on a free loopback port, a client that keeps to the wire, a storage that fails
//! on command, and an ear for logs and events.

#![allow(
    clippy::disallowed_methods,
    reason = "the harness is outside of what `Env` drives"
)]

use std::time::Duration;

pub mod catalogue;
mod chance;
pub mod client;
pub mod example;
pub mod faults;
pub mod feed;
pub mod fuzz;
pub mod hooked;
pub mod incoming;
pub mod kills;
pub mod listen;
pub mod node;
pub mod postgres;
pub mod redis;
pub mod runs;
pub mod server;
pub mod sim;
pub mod sqlite;

pub use self::{
    client::{Answer, Call, Protocol, assert_replays},
    example::Example,
    faults::{Fault, FaultyStorage},
    feed::{End, Feed, Length},
    hooked::{Hook, Hooked, Moment, StorageCall, Waits},
    incoming::{Ending, Incoming},
    listen::{Events, Logs},
    runs::{Gate, Runs},
    server::Server,
};

/// When a test gives up on what has to come. Only a failure takes so long, however busy the machine is.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The README's examples compile and run as doctests of this package.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
#[derive(Debug)]
pub struct Readme;
