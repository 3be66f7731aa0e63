//! Whole requests.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{Router, routing::any};
use http::StatusCode;
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use idempotency_axum::{
    Config, EncodedKey, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy,
    MemoryStorage,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What a client writes on a connection, sent twice, runs no operation twice, and is never answered with a 500.
///
/// # Panics
///
/// Panics if that is not so.
pub fn request(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let ran = Arc::new(Mutex::new(HashSet::new()));
        let handler = move |key: Option<IdempotencyKey>, _: String| {
            let is_first = key.is_none_or(|key| run(&ran, key.encoded()));
            assert!(is_first, "the same operation ran twice");
            std::future::ready(StatusCode::CREATED)
        };
        let optional = handler.clone().idempotency_key(KeyPolicy::optional());
        let config = Config::default().max_request_body(64).max_response_body(16);
        let app = Router::new()
            .route("/optional", any(optional))
            .fallback(handler)
            .layer(IdempotencyLayer::enforce(MemoryStorage::new()).config(config));
        for _ in 0..2 {
            let answers = send(&app, bytes).await;
            let answers = String::from_utf8_lossy(&answers);
            assert!(!answers.contains("HTTP/1.1 500"), "{answers}");
            assert!(!answers.contains("HTTP/1.0 500"), "{answers}");
        }
    });
}

fn run(ran: &Mutex<HashSet<EncodedKey>>, key: EncodedKey) -> bool {
    ran.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(key)
}

/// All answers to what a client sends before it says that it is done.
async fn send(app: &Router, bytes: &[u8]) -> Vec<u8> {
    let (mut client, server) = tokio::io::duplex(64 << 10);
    let service = TowerToHyperService::new(app.clone());
    let connection = http1::Builder::new().serve_connection(TokioIo::new(server), service);
    let client = async {
        let mut answers = Vec::new();
        let (mut read, mut write) = tokio::io::split(&mut client);
        let written = async {
            // The server may have closed before it read all.
            let _ = write.write_all(bytes).await;
            let _ = write.shutdown().await;
        };
        let (_, _) = tokio::join!(written, read.read_to_end(&mut answers));
        answers
    };
    // What is no HTTP ends the connection with an error.
    let (_, answers) = tokio::join!(connection, client);
    answers
}
