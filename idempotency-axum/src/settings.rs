//! A layer from settings.

use idempotency_core::{Mode, Opened, Settings, SettingsError};

use crate::IdempotencyLayer;

impl IdempotencyLayer {
    /// Makes the layer that `settings` describe, and opens its storages. Needs the feature `settings`.
    ///
    /// ```
    /// use axum::{Router, routing::post};
    /// use idempotency_axum::{IdempotencyLayer, Settings, idempotency_key};
    ///
    /// #[idempotency_key(cache_name = "orders")]
    /// async fn create_order() -> &'static str {
    ///     "order 1"
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let settings: Settings = serde_json::from_str(
    ///     r#"{ "mode": "exempt", "lock": { "timeout": "2s" }, "storages": { "orders": "memory" } }"#,
    /// )?;
    /// let layer = IdempotencyLayer::from_settings(settings).await?;
    /// let app = Router::new()
    ///     .route("/orders", post(create_order))
    ///     .layer(layer.clone());
    /// let app = layer.check(app)?;
    /// # let _ = app;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Options that a file can't express are set afterwards, on the configuration from the file:
    ///
    /// ```
    /// use idempotency_axum::{Event, IdempotencyLayer, Settings};
    ///
    /// # async fn layer(settings: Settings) -> Result<IdempotencyLayer, idempotency_axum::SettingsError> {
    /// let config = settings.config().observer(|event: &Event<'_>| println!("{}", event.name()));
    /// let layer = IdempotencyLayer::from_settings(settings).await?.config(config);
    /// # Ok(layer)
    /// # }
    /// # let _ = layer;
    /// ```
    ///
    /// # Errors
    ///
    /// If a storage can't be opened; see [`Settings::open`].
    pub async fn from_settings(settings: Settings) -> Result<Self, SettingsError> {
        let Opened {
            mode,
            config,
            storage,
            default_cache,
            caches,
            ..
        } = settings.open().await?;
        let layer = match mode {
            Mode::Enforce => Self::enforce(storage),
            Mode::Exempt => Self::exempt(storage),
            Mode::Optional => Self::optional(storage),
        };
        let layer = layer.config(config).default_cache(default_cache);
        let caches = caches.into_iter();
        Ok(caches.fold(layer, |layer, (name, storage)| layer.cache(name, storage)))
    }
}
