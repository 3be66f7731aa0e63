//! A storage of your own in three functions: records in files, claims held by a lock of this process.
//!
//! `cargo run -p idempotency-examples --example custom_storage` prints the `curl` lines to try. `RECORDS` names the directory of
//! the files, a fresh one by default: name one, stop and start again, and retries still get their answers. `PORT` chooses
//! another port than 3000, `PORT=0` any free one.
//!
//! Put your cache in the place of `Files`: memcached, a key-value service, a table. What serves it from several processes needs
//! a [`Lock`](idempotency_axum::Lock) that all of them ask, in the place of `ProcessLock`.

use std::{
    error::Error,
    io::{self, ErrorKind},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{Router, body::Bytes, routing::post};
use idempotency_axum::{
    Cache, EncodedKey, IdempotencyLayer, LockedStorage, ProcessLock, StorageError, Token,
    idempotency_key,
};
use tokio::fs;

// ---- the cache

/// A file per key, in one directory: when it expires, in seconds since 1970, then the value.
struct Files {
    directory: PathBuf,
}

impl Cache for Files {
    async fn get(&self, key: &EncodedKey) -> Result<Option<Bytes>, StorageError> {
        let file = match fs::read(self.path(key)).await {
            Ok(file) => Bytes::from(file),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            // A file that can't be read is not one that isn't there: the operation may have run.
            Err(error) => return Err(StorageError::unavailable(error)),
        };
        let Some(expires) = file.first_chunk() else {
            return Err(StorageError::unreadable("the file is cut off"));
        };
        if u64::from_be_bytes(*expires) <= unix_time() {
            return Ok(None);
        }
        Ok(Some(file.slice(expires.len()..)))
    }

    async fn set(&self, key: &EncodedKey, value: Bytes, ttl: Duration) -> Result<(), StorageError> {
        // Rounded up: a record may stay too long, but not too short.
        let expires = unix_time().saturating_add(ttl.as_secs().saturating_add(1));
        let file = [&expires.to_be_bytes()[..], &value].concat();
        // Under another name first, so that nobody ever reads half of it.
        let written = self.directory.join(Token::random().to_string());
        let set = async {
            fs::write(&written, file).await?;
            fs::rename(&written, self.path(key)).await
        };
        set.await.map_err(StorageError::unavailable)
    }

    async fn remove(&self, key: &EncodedKey) -> Result<(), StorageError> {
        match fs::remove_file(self.path(key)).await {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(StorageError::unavailable(error))
            }
            _ => Ok(()),
        }
    }
}

impl Files {
    async fn open() -> io::Result<Self> {
        let directory = match std::env::var_os("RECORDS") {
            Some(directory) => directory.into(),
            None => std::env::temp_dir().join(format!("idempotency-{}", Token::random())),
        };
        fs::create_dir_all(&directory).await?;
        Ok(Self { directory })
    }

    /// An encoded key is a hash, so its name can't point anywhere else.
    fn path(&self, key: &EncodedKey) -> PathBuf {
        self.directory.join(key.to_string())
    }
}

fn unix_time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

// ---- the service

/// Counts executions, so that an answer shows whether its handler ran.
static RUNS: AtomicU32 = AtomicU32::new(1);

#[idempotency_key]
async fn pay() -> String {
    format!("run {}: paid\n", RUNS.fetch_add(1, Ordering::Relaxed))
}

async fn run() -> Result<(), Box<dyn Error>> {
    let files = Files::open().await?;
    let directory = files.directory.clone();
    // What this composition can't promise is said at `LockedStorage`.
    let storage = LockedStorage::new(files, ProcessLock::new());
    let layer = IdempotencyLayer::enforce(storage);
    let router = Router::new()
        .route("/payments", post(pay))
        .layer(layer.clone());
    let router = layer.check(router)?;

    let listener = idempotency_examples::listen().await?;
    print_what_to_try(listener.local_addr()?, &directory.display().to_string());
    axum::serve(listener, router).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    idempotency_examples::log();
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print_what_to_try(address: SocketAddr, directory: &str) {
    let curl = format!("curl -i -X POST http://{address}");
    println!(
        "\
Payments at http://{address}
Their records lie in {directory}
Try these lines in another terminal.

# The first one runs: 200.
{curl}/payments -H 'Idempotency-Key: payment-1'

# The retry gets what the first one got, marked as a conflict: 409 with `idempotency-replayed: true`.
# It does so too when you stop this and start it again with RECORDS={directory}
{curl}/payments -H 'Idempotency-Key: payment-1'

# Another key: 200.
{curl}/payments -H 'Idempotency-Key: payment-2'

Ctrl-c stops."
    );
}
