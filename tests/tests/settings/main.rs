//! Layers from settings: that each field does what it says, that all formats say the same, and what is refused, how.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::State,
    routing::any,
};
use http::{HeaderMap, Method, Request, StatusCode, header};
use idempotency_axum::{IdempotencyHandler, IdempotencyLayer, KeyPolicy, Settings, SettingsError};
use idempotency_tests::{Answer, Gate, Runs, Server};
use serde_json::{Value, json};
use tower::ServiceExt;

mod effects;
mod formats;
mod refusals;
mod secrets;

/// Settings as JSON gives them.
#[track_caller]
fn settings(json: Value) -> Settings {
    match serde_json::from_value(json.clone()) {
        Ok(settings) => settings,
        Err(error) => panic!("{json}: {error}"),
    }
}

async fn try_layer(json: Value) -> Result<IdempotencyLayer, SettingsError> {
    IdempotencyLayer::from_settings(settings(json)).await
}

async fn layer(json: Value) -> IdempotencyLayer {
    match try_layer(json.clone()).await {
        Ok(layer) => layer,
        Err(error) => panic!("{json}: {error}"),
    }
}

/// A service whose layer is made from settings.
#[derive(Clone)]
struct App {
    router: Router,
    /// `None` if it is asked without a network in between.
    server: Option<Arc<Server>>,
    layer: IdempotencyLayer,
    kitchen: Kitchen,
}

#[derive(Clone, Default)]
struct Kitchen {
    runs: Runs,
    gate: Gate,
}

/// Answers as the request asks: `x-status` is its status, `x-gate` sends it through the gate, `x-size` makes it long.
async fn order(
    State(kitchen): State<Kitchen>,
    headers: HeaderMap,
    _: String,
) -> (StatusCode, HeaderMap, String) {
    let run = kitchen.runs.next();
    if headers.contains_key("x-gate") {
        kitchen.gate.enter().await;
    }
    let number = |name| headers.get(name).map(|value| value.to_str().unwrap());
    let status = number("x-status").unwrap_or("201").parse().unwrap();
    let size = number("x-size").unwrap_or("0").parse().unwrap();
    let mut answered = HeaderMap::new();
    answered.insert(header::SET_COOKIE, "a=b".parse().unwrap());
    answered.insert(header::LOCATION, "/orders/1".parse().unwrap());
    let body = format!("order {run}{}", " ".repeat(size));
    (status, answered, body)
}

impl App {
    async fn new(json: Value) -> Self {
        let app = Self::in_process(json).await;
        Self {
            server: Some(Arc::new(Server::start(app.router.clone()).await)),
            ..app
        }
    }

    /// For tests on a paused clock, which a network does not know of.
    async fn in_process(json: Value) -> Self {
        let layer = layer(json).await;
        let kitchen = Kitchen::default();
        let cached = |name| order.idempotency_key(KeyPolicy::required().cache_name(name));
        let caches = ["default", "main", "orders", "refunds"];
        let router = caches.iter().fold(Router::new(), |router, name| {
            router.route(&format!("/cache/{name}"), any(cached(*name)))
        });
        let router = router
            .route("/orders", any(order))
            .route("/refunds", any(order))
            .layer(layer.clone())
            .with_state(kitchen.clone());
        Self {
            router,
            server: None,
            layer,
            kitchen,
        }
    }

    fn post(&self, path: &str) -> Ask {
        self.ask(Method::POST, path)
    }

    fn ask(&self, method: Method, path: &str) -> Ask {
        let request = Request::builder().method(method).uri(path);
        Ask {
            app: self.clone(),
            request: request.body(String::new()).unwrap(),
        }
    }

    fn runs(&self) -> usize {
        self.kitchen.runs.count()
    }
}

/// A request that is being put together.
struct Ask {
    app: App,
    request: Request<String>,
}

impl Ask {
    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.request
            .headers_mut()
            .append(name, value.parse().unwrap());
        self
    }

    fn key(self, key: &str) -> Self {
        self.with("idempotency-key", key)
    }

    fn body(mut self, body: &str) -> Self {
        *self.request.body_mut() = body.to_owned();
        self
    }

    async fn send(self) -> Answer {
        if let Some(server) = &self.app.server {
            let (parts, body) = self.request.into_parts();
            let call = server.call(parts.method, parts.uri.path());
            let call = parts.headers.iter().fold(call, |call, (name, value)| {
                call.header(name.as_str(), value.as_bytes())
            });
            return call.body(body).send().await;
        }
        let request = self.request.map(Body::from);
        let response = self.app.router.oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body: to_bytes(body, usize::MAX).await.unwrap(),
        }
    }

    fn start(self) -> tokio::task::JoinHandle<Answer> {
        tokio::spawn(self.send())
    }

    async fn code(self) -> u16 {
        self.send().await.code()
    }
}

/// What the environment holds, as the crate `config` gives it.
fn from_environment(variables: &[(&str, &str)]) -> Result<Settings, config::ConfigError> {
    let variables: HashMap<_, _> = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    let environment = config::Environment::with_prefix("IDEMPOTENCY")
        .separator("__")
        .source(Some(variables));
    config::Config::builder()
        .add_source(environment)
        .build()?
        .try_deserialize()
}

/// What the crate `config` makes of a JSON document; what is no table it refuses itself.
fn layered(document: &Value) -> Option<Result<Settings, config::ConfigError>> {
    let file = config::File::from_str(&document.to_string(), config::FileFormat::Json);
    let config = config::Config::builder().add_source(file).build();
    document
        .is_object()
        .then(|| config.and_then(config::Config::try_deserialize))
}

/// The errors of a document, as each way of reading it gives them; there must be one in each.
async fn errors(document: Value) -> Vec<String> {
    let text = document.to_string();
    let read = [
        layered(&document).map(|read| read.map_err(|error| error.to_string())),
        Some(serde_json::from_str(&text).map_err(|error| error.to_string())),
        Some(serde_json::from_value(document).map_err(|error| error.to_string())),
    ];
    let mut errors = Vec::new();
    for settings in read.into_iter().flatten() {
        errors.push(match settings {
            Err(error) => error,
            Ok(settings) => match IdempotencyLayer::from_settings(settings).await {
                Err(error) => error.to_string(),
                Ok(_) => panic!("{text} is accepted"),
            },
        });
    }
    errors
}

#[tokio::test]
async fn nothing_set_is_the_default_in_every_format() {
    let empty: [Settings; 4] = [
        settings(json!({})),
        settings(json!(null)),
        toml::from_str("").unwrap(),
        from_environment(&[]).unwrap(),
    ];
    for settings in empty {
        assert_eq!(settings, Settings::default());
        let config = format!("{:?}", settings.config());
        assert_eq!(config, format!("{:?}", idempotency_axum::Config::default()));
        let _ = IdempotencyLayer::from_settings(settings).await.unwrap();
    }
}
