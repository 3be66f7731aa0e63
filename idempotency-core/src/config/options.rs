//! From the list of options in [`config`](super) to the code that each of them needs.

/// Makes `Config` of the list of its options: the fields, their defaults, `Debug`, and the setters that only set. The options after
/// `and` have setters of their own.
macro_rules! options {
    (
        $(#[$config:meta])*
        pub struct Config {
            $($(#[$doc:meta])* $option:ident($argument:ident): $type:ty = $default:expr,)*
        }
        and {
            $($(#[$field_doc:meta])* $visible:vis $field:ident: $field_type:ty = $field_default:expr,)*
        }
    ) => {
        $(#[$config])*
        #[derive(Clone)]
        #[must_use]
        #[non_exhaustive]
        pub struct Config {
            $(
                #[doc = concat!("See [`Config::", stringify!($option), "`].")]
                pub $option: $type,
            )*
            $($(#[$field_doc])* $visible $field: $field_type,)*
        }

        impl Config {
            $(
                $(#[$doc])*
                pub fn $option(mut self, $argument: $type) -> Self {
                    self.$option = $argument;
                    self
                }
            )*
        }

        impl Default for Config {
            fn default() -> Self {
                Self {
                    $($option: $default,)*
                    $($field: $field_default,)*
                }
            }
        }

        impl fmt::Debug for Config {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct("Config")
                    $(.field(stringify!($option), &self.$option))*
                    .field("methods", &self.methods)
                    .field("max_buffered", &self.budget.limit())
                    .field("replay_header", &self.replay_header)
                    .field("stripped_headers", &self.stripped_headers)
                    .field("documentation", &self.documentation)
                    .field("observers", &self.observers.len())
                    .finish_non_exhaustive()
            }
        }
    };
}
pub(super) use options;
