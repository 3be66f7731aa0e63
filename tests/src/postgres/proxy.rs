//! The network before a server, which loses an answer.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
};

use super::Postgres;

/// Passes everything on, but for an answer that it is told to lose.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    lost: Lost,
}

/// What the question of which the answer is lost has in it.
type Lost = Arc<Mutex<Option<Vec<u8>>>>;

impl Proxy {
    /// One before this server, until the runtime ends.
    ///
    /// # Panics
    ///
    /// Panics if it can't listen.
    pub async fn before(postgres: &Postgres) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let socket = postgres.directory().join(".s.PGSQL.5432");
        let lost = Lost::default();
        let losing = lost.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, socket.clone(), losing.clone()));
            }
        });
        Self { port, lost }
    }

    /// Where it listens.
    #[must_use]
    pub fn url(&self) -> String {
        let port = self.port;
        format!(
            "postgres://postgres@127.0.0.1:{port}/postgres?application_name=shop&sslmode=disable"
        )
    }

    /// Loses the answer to the next message with these bytes in it, and closes its connection. The server has done what it asked.
    pub fn lose_the_answer_to(&self, words: &[u8]) {
        *lock(&self.lost) = Some(words.to_owned());
    }

    /// Whether no answer is to be lost any more.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        lock(&self.lost).is_none()
    }
}

async fn pass(mut client: TcpStream, socket: PathBuf, lost: Lost) {
    let Ok(mut server) = UnixStream::connect(socket).await else {
        return;
    };
    let (mut buffer, mut answer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let passed = tokio::select! {
            read = client.read(&mut buffer) => match read {
                Ok(length) if length > 0 => {
                    if server.write_all(&buffer[..length]).await.is_err() {
                        return;
                    }
                    if is_to_be_lost(&lost, &buffer[..length]) {
                        // Until the server says that it is done.
                        let _ = server.read(&mut answer).await;
                        return;
                    }
                    Ok(())
                }
                _ => return,
            },
            read = server.read(&mut answer) => match read {
                Ok(length) if length > 0 => client.write_all(&answer[..length]).await,
                _ => return,
            },
        };
        if passed.is_err() {
            return;
        }
    }
}

fn is_to_be_lost(lost: &Lost, message: &[u8]) -> bool {
    let mut lost = lock(lost);
    let is_it = lost
        .as_ref()
        .is_some_and(|words| message.windows(words.len()).any(|part| part == words));
    if is_it {
        *lost = None;
    }
    is_it
}

fn lock(lost: &Lost) -> std::sync::MutexGuard<'_, Option<Vec<u8>>> {
    lost.lock().unwrap_or_else(PoisonError::into_inner)
}
