//! Real Redis servers, killed when they are dropped; the network before them, with its faults; and services that share one.

mod cluster;
mod process;
mod proxy;
mod server;

pub use self::{
    cluster::Cluster,
    process::{Process, Spec, assert_fifty_of_two_thousand_run, runs_of_two_thousand},
    proxy::{Chaos, Late, Proxy, Withheld},
    server::{Monitor, Redis, RedisBuilder, free_port},
};

pub(crate) use self::server::{directory, send_signal};
