//! Three masters that share the keys.

use std::time::{Duration, Instant};

use idempotency_axum::EncodedKey;

use super::server::{Redis, ask};
use crate::PATIENCE;

const SLOTS: u16 = 16_384;

/// A Cluster of three masters, which serves the keys that it has when one of them is gone.
#[derive(Debug)]
pub struct Cluster {
    masters: Vec<Redis>,
}

impl Cluster {
    /// Starts it.
    ///
    /// # Panics
    ///
    /// Panics if it does not come together.
    pub async fn start() -> Self {
        let mut masters = Vec::new();
        for _ in 0..3 {
            masters.push(
                Redis::builder()
                    .on_a_port()
                    .cluster_node()
                    .with(&["--cluster-node-timeout", "5000"])
                    .with(&["--cluster-require-full-coverage", "no"])
                    .start(),
            );
        }
        let cluster = Self { masters };
        cluster.join().await;
        cluster
    }

    async fn join(&self) {
        let first = &self.masters[0];
        let bus: Vec<String> = first.ask(&["CONFIG", "GET", "cluster-port"]).await;
        for (n, master) in self.masters.iter().enumerate() {
            let [from, to] = [n, n + 1].map(|n| u16::try_from(n).unwrap_or(0) * (SLOTS / 3 + 1));
            let slots = [from.to_string(), (to.min(SLOTS) - 1).to_string()];
            let add = ["CLUSTER", "ADDSLOTSRANGE", &slots[0], &slots[1]];
            let _: String = master.ask(&add).await;
            let epoch = (n + 1).to_string();
            let _: String = master.ask(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch]).await;
            if n > 0 {
                let port = first.port().to_string();
                let meet = ["CLUSTER", "MEET", "127.0.0.1", &port, &bus[1]];
                let _: String = master.ask(&meet).await;
            }
        }
        let since = Instant::now();
        for master in &self.masters {
            // Gossip tells nobody that it has come to its end.
            loop {
                let info: String = master.ask(&["CLUSTER", "INFO"]).await;
                let has = |line: &str| info.lines().any(|has| has == line);
                if has("cluster_state:ok") && has("cluster_size:3") && has("cluster_slots_ok:16384")
                {
                    break;
                }
                assert!(since.elapsed() < PATIENCE, "no Cluster: {info}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// All masters, with commas between, as `connect` takes them.
    #[must_use]
    pub fn url(&self) -> String {
        let urls = self
            .masters
            .iter()
            .map(|master| format!("redis://127.0.0.1:{}", master.port()));
        urls.collect::<Vec<_>>().join(",")
    }

    /// The number of the master that has a key of this name.
    ///
    /// # Panics
    ///
    /// Panics if no master answers.
    pub async fn master_of(&self, name: &str) -> usize {
        let slot: u16 = ask(&self.masters[0].url(), &["CLUSTER", "KEYSLOT", name]).await;
        usize::from(slot / (SLOTS / 3 + 1))
    }

    /// A key that is under `{prefix}:` on this master.
    ///
    /// # Panics
    ///
    /// Panics if no master answers.
    pub async fn key_on(&self, master: usize, prefix: &str, not_before: u8) -> EncodedKey {
        for n in not_before..=u8::MAX {
            let key = EncodedKey::from_bytes([n; 32]);
            if self.master_of(&format!("{prefix}:{key}")).await == master {
                return key;
            }
        }
        panic!("no key of master {master}");
    }

    /// One of the masters.
    #[must_use]
    pub fn master(&self, master: usize) -> &Redis {
        &self.masters[master]
    }

    /// Kills one of the masters.
    pub fn kill(&mut self, master: usize) {
        self.masters[master].kill();
    }
}
