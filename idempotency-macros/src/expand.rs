//! What the attributes become.
//!
//! ```text
//! pub const create_order: Hidden = Hidden { seat: Seat::FREE };   // docs, deprecation
//! pub struct Hidden { seat: Seat }
//! const _: () = {
//!     async fn create_order(…) -> … { … }                         // all other attributes
//!     impl Hidden { NAME, __policy(), pub invoke(…), pub policy(), or(…) }         // `or`: an error
//!     impl Clone for Hidden { … }                                 // announces the policy
//!     impl Handler<(M, …), S> for Hidden { … }                    // axum's own bounds
//! };
//! ```
//!
//! A constant lives among the values only, so a module may have the handler's name. The block gives the function its own
//! name back, for recursion and for what other attributes make of it. Nothing else in the block has a name that the body of
//! the function could see.

use proc_macro2::{Ident, Literal, Span, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::{ExprPath, ReturnType, Signature, Type, ext::IdentExt, spanned::Spanned};

use crate::{
    Attribute,
    args::{KeyArgs, Policy},
    item::{HandlerFn, without_our_attributes},
};

/// Expands `attribute` with `args` on `item`. With an error the item stays a plain function.
pub(crate) fn expand(attribute: Attribute, args: TokenStream, item: TokenStream) -> TokenStream {
    let parsed = Policy::parse(attribute, args)
        .and_then(|policy| Ok((policy, HandlerFn::parse(attribute, item.clone())?)));
    match parsed {
        Ok((policy, handler)) => handler_with_policy(&policy, &handler),
        Err(error) => {
            let error = error.into_compile_error();
            let item = without_our_attributes(item);
            quote!(#error #item)
        }
    }
}

fn handler_with_policy(policy: &Policy, handler: &HandlerFn) -> TokenStream {
    let HandlerFn {
        attributes,
        visibility,
        signature,
        body,
        ..
    } = handler;
    let name = &signature.ident;
    let hidden = hidden(name);

    let private = private();
    let everywhere = &attributes.everywhere;
    let on_constant = &attributes.constant;
    let on_block = &attributes.block;
    let on_function = &attributes.function;
    let conflicts = &attributes.conflicts;

    // Spanned as the function: what lints say about the item (dead, undocumented, …) they say about the user's line.
    let constant = quote_spanned! {signature.fn_token.span=>
        const #name: #hidden = #hidden { seat: #private::Seat::FREE };
    };
    let inherent = inherent_impl(policy, handler, &hidden);
    let clone = clone_impl(&hidden);
    let handler_impl = handler_impl(handler, &hidden);
    let needs_checks = needs_checks(policy, handler);

    quote! {
        #(#everywhere #conflicts)*

        #everywhere
        #on_constant
        #[allow(non_upper_case_globals)]
        #visibility #constant

        #everywhere
        #[doc(hidden)]
        #[allow(non_camel_case_types)]
        #visibility struct #hidden {
            seat: #private::Seat,
        }

        #everywhere
        #on_block
        const _: () = {
            #on_function
            #signature #body
            // One warning about a handler that no route has: the one about the constant.
            let _ = #name;

            #inherent
            #clone
            #handler_impl
            #needs_checks
        };
    }
}

/// The name of the hidden type. It is all that we can say in the compiler's error where the handler is called as a function (`expected
/// function, found …`), by the user or by an attribute above ours. So it says what to do instead.
fn hidden(name: &Ident) -> Ident {
    format_ident!(
        "{}__call_it_by_invoke__debug_handler_goes_below",
        name.unraw()
    )
}

/// What the handler is called, what it wants, and how a test calls it.
fn inherent_impl(policy: &Policy, handler: &HandlerFn, hidden: &Ident) -> TokenStream {
    let private = private();
    let HandlerFn {
        visibility,
        signature: Signature { ident, output, .. },
        parameters,
        ..
    } = handler;
    let text = ident.unraw().to_string();
    let policy = match policy {
        Policy::Key(args) => key_policy(args, handler),
        Policy::Exempt => quote!(#private::KeyPolicy::exempt()),
    };
    // Once: functions that the arguments name may return what is equal only to itself.
    let policy = quote! {
        static __IDEMPOTENCY_POLICY: ::std::sync::OnceLock<#private::KeyPolicy> =
            ::std::sync::OnceLock::new();
        __IDEMPOTENCY_POLICY.get_or_init(|| #policy)
    };
    let arguments = arguments(handler);
    let doc = format!(
        "Calls `{text}` as the function that it was written as: without a request, a key or a layer. For unit tests."
    );

    quote! {
        impl #hidden {
            const __NAME: &'static ::core::primitive::str =
                ::core::concat!(::core::module_path!(), "::", #text);

            fn __policy() -> &'static #private::KeyPolicy {
                #policy
            }

            #[doc = #doc]
            #[allow(clippy::too_many_arguments, clippy::type_complexity)]
            #visibility async fn invoke(self, #(#arguments: #parameters),*) #output {
                #ident(#(#arguments),*).await
            }

            /// The policy of this handler, for `IdempotencyLayer::encoded_key_for`.
            #visibility fn policy(self) -> #private::KeyPolicy {
                ::core::clone::Clone::clone(Self::__policy())
            }

            #[doc(hidden)]
            pub fn or<__IdempotencyH: #private::CombinedWithoutAttribute>(self, _: __IdempotencyH) -> Self {
                self
            }
        }
    }
}

fn key_policy(args: &KeyArgs, handler: &HandlerFn) -> TokenStream {
    let private = private();
    let constructor = if args.optional {
        quote!(optional)
    } else {
        quote!(required)
    };
    let cache_name = args
        .cache_name
        .as_ref()
        .map(|name| quote!(.cache_name(#name)));
    let ttl = args.ttl.map(|ttl| {
        let (seconds, nanos) = (ttl.as_secs(), ttl.subsec_nanos());
        quote!(.ttl(::core::time::Duration::new(#seconds, #nanos)))
    });
    let max_request_body = args.max_request_body.map(|bytes| {
        let bytes = Literal::u64_unsuffixed(bytes);
        quote!(.max_request_body(#bytes))
    });
    let header = args
        .header
        .as_ref()
        .map(|name| quote!(.header(#private::HeaderName::from_static(#name))));
    let store_on = args.store_on.as_ref().map(|path| {
        let store_on = call(path, &quote!(StoreOn));
        quote!(.store_on(#store_on))
    });
    let scope = args.scope.as_ref().map(|path| {
        let scope = call(path, &quote!(Scope));
        quote!(.scope(#scope))
    });
    let policy = quote! {
        #private::KeyPolicy::#constructor()
            #cache_name #ttl #max_request_body #header #store_on #scope
    };
    if handler.parameters.is_empty() {
        return policy;
    }

    // By type, not by name: an alias or an `Option` of an extractor is found too.
    let parameters = &handler.parameters;
    quote! {
        #private::policy_with(#policy, const {
            use #private::NoNeeds as _;
            #private::Needs::NONE #(.and(#private::NeedsOf::<#parameters>::NEEDS))*
        })
    }
}

/// Calls the function at `path`; the compiler says at the path if it returns anything but `result`.
fn call(path: &ExprPath, result: &TokenStream) -> TokenStream {
    let private = private();
    let span = Span::mixed_site().located_at(path.span());
    quote_spanned! {span=> {
        let function: fn() -> #private::#result = #path;
        function()
    }}
}

fn clone_impl(hidden: &Ident) -> TokenStream {
    quote! {
        impl ::core::clone::Clone for #hidden {
            fn clone(&self) -> Self {
                Self {
                    seat: self.seat.announce(Self::__NAME, || ::core::clone::Clone::clone(Self::__policy())),
                }
            }
        }

        impl ::core::fmt::Debug for #hidden {
            fn fmt(&self, __idempotency_f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                __idempotency_f.write_str(Self::__NAME)
            }
        }
    }
}

/// The impl that axum has for functions, on the same terms. The function runs through axum's own, too.
fn handler_impl(handler: &HandlerFn, hidden: &Ident) -> TokenStream {
    let private = private();
    let name = &handler.signature.ident;
    let arguments = arguments(handler);
    let parameters = &handler.parameters;

    let (generics, marker, bounds) = match parameters.split_last() {
        None => (quote!(__IdempotencyS), quote!(((),)), TokenStream::new()),
        Some((last, parts)) => {
            let parts_bounds = parts.iter().map(|part| {
                bound(
                    part,
                    |span| quote_spanned!(span=> FromRequestParts<__IdempotencyS>),
                )
            });
            let last_bound = bound(
                last,
                |span| quote_spanned!(span=> FromRequest<__IdempotencyS, __IdempotencyM>),
            );
            (
                quote!(__IdempotencyS, __IdempotencyM),
                quote!((__IdempotencyM, #(#parts,)* #last,)),
                quote! {
                    where
                        __IdempotencyS: ::core::marker::Send + ::core::marker::Sync + 'static,
                        #(#parts_bounds,)*
                        #last_bound,
                },
            )
        }
    };

    // The compiler finds here that the future is not `Send`, or its output no answer.
    let output = match &handler.signature.output {
        ReturnType::Type(_, output) => output.span(),
        ReturnType::Default => name.span(),
    };
    let span = Span::call_site().located_at(output);
    let respond = private_at(span);
    let function = quote_spanned! {span=>
        move |#(#arguments: #parameters),*| {
            __idempotency_entry.mark();
            #respond::respond(#name(#(#arguments),*))
        }
    };

    quote! {
        impl<#generics> #private::Handler<#marker, __IdempotencyS> for #hidden
        #bounds
        {
            type Future = #private::HandlerFuture<#private::BoxedFuture>;

            fn call(
                self,
                __idempotency_request: #private::Request,
                __idempotency_state: __IdempotencyS,
            ) -> Self::Future {
                #private::run(
                    &self.seat,
                    Self::__NAME,
                    Self::__policy(),
                    __idempotency_request,
                    move |__idempotency_request, __idempotency_entry| {
                        #private::Handler::<#marker, __IdempotencyS>::call(
                            #function,
                            __idempotency_request,
                            __idempotency_state,
                        )
                    },
                )
            }
        }
    }
}

/// Bounds a parameter's type as axum does.
///
/// Through the state: while the compiler does not know that, it can't reject the impl for a bound that does not hold. So it takes
/// the impl, and then names the parameter that fails instead of the handler.
fn bound(parameter: &Type, extractor: impl FnOnce(Span) -> TokenStream) -> TokenStream {
    let span = Span::call_site().located_at(parameter.span());
    let private = private_at(span);
    let extractor = extractor(span);
    quote_spanned! {span=>
        <__IdempotencyS as #private::WithState<#parameter>>::Type:
            #private::#extractor + ::core::marker::Send
    }
}

/// What a parameter needs and the policy does not give: one check per parameter, so that the error points at it. And one of all
/// together.
fn needs_checks(policy: &Policy, handler: &HandlerFn) -> TokenStream {
    let private = private();
    let check = |parameter: &Type| {
        let span = Span::mixed_site().located_at(parameter.span());
        let checks = match policy {
            Policy::Key(KeyArgs { optional: true, .. }) => quote_spanned! {span=>
                ::core::assert!(
                    !__IDEMPOTENCY_NEEDS.is_key(),
                    "an optional handler also runs without a key: take an `Option` of this, or remove `optional`"
                );
            },
            Policy::Key(_) => return None,
            Policy::Exempt => quote_spanned! {span=>
                ::core::assert!(
                    !__IDEMPOTENCY_NEEDS.is_manual(),
                    "an exempt handler has no conflicts to handle: use `#[idempotency_key]`, or remove this parameter"
                );
                ::core::assert!(
                    !__IDEMPOTENCY_NEEDS.is_key(),
                    "an exempt handler has no key: use `#[idempotency_key]`, or take an `Option` of this"
                );
            },
        };
        Some(quote_spanned! {span=>
            const _: () = {
                use #private::NoNeeds as _;
                const __IDEMPOTENCY_NEEDS: #private::Needs = #private::NeedsOf::<#parameter>::NEEDS;
                #checks
            };
        })
    };
    let checks: TokenStream = handler.parameters.iter().filter_map(check).collect();
    let name = handler.signature.ident.span();
    let parameters = &handler.parameters;
    let both = quote_spanned! {Span::mixed_site().located_at(name)=>
        const _: () = {
            use #private::NoNeeds as _;
            ::core::assert!(
                #private::Needs::NONE #(.and(#private::NeedsOf::<#parameters>::NEEDS))*.can_be_met(),
                "a handler that answers conflicts itself shares no transaction with its record: take `ManualIdempotency` or `IdempotentTransaction`"
            );
        };
    };
    quote!(#checks #both)
}

/// Names for the parameters, whose patterns stay with the function. No user's constant has such a name, so that they bind.
fn arguments(handler: &HandlerFn) -> Vec<Ident> {
    (0..handler.parameters.len())
        .map(|index| format_ident!("__idempotency_{index}", span = Span::mixed_site()))
        .collect()
}

/// Where everything that the expansion uses is found.
fn private() -> TokenStream {
    private_at(Span::call_site())
}

/// The same, for what the compiler may complain of at `span`.
fn private_at(span: Span) -> TokenStream {
    quote_spanned!(span=> ::idempotency_axum::__private)
}
