-- Stores: the events of Stripe and RevenueCat, read into our own terms (41): pure functions, which
-- anybody can try with select.

-- A Stripe event in our terms, whichever version of their API it is of: with 2025-03-31 (basil) an
-- invoice's subscription went to parent, a line's price to pricing, and a subscription's period to
-- its items. What means nothing to us has an id, a type and a time.
--
-- A Checkout session with an invoice sells nothing: the invoice does, and both are sent.
create function private.read_stripe(p_event jsonb) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_type text := p_event ->> 'type';
  v_at timestamptz := to_timestamp((p_event ->> 'created')::bigint);
  v_of jsonb := p_event #> '{data,object}';
  v_said jsonb := jsonb_build_object(
    'id', p_event -> 'id', 'type', v_type, 'happened_at', v_at,
    'is_test', p_event -> 'livemode' = 'false'
  );
begin
  if v_type not in (
    'invoice.paid', 'invoice.payment_succeeded', 'invoice_payment.paid', 'charge.refunded',
    'checkout.session.completed', 'checkout.session.async_payment_succeeded'
  ) and v_type !~ '^(charge\.dispute|customer\.subscription)\.(cre|upd|del|clos|funds|paus|resum)' then
    return v_said;
  end if;
  v_said := v_said || jsonb_build_object('users', jsonb_build_array(
    v_of #> '{metadata,user_id}', v_of -> 'client_reference_id',
    v_of #> '{parent,subscription_details,metadata,user_id}',
    v_of #> '{subscription_details,metadata,user_id}', v_of #> '{lines,data,0,metadata,user_id}',
    v_of -> 'customer'
  ));
  if v_type like 'invoice.%' then
    return v_said || jsonb_build_object(
      'amount', v_of -> 'amount_paid',
      'payments', jsonb_build_array(
        v_of -> 'id', v_of -> 'payment_intent', v_of -> 'charge',
        v_of #> '{payments,data,0,payment,payment_intent}'
      ),
      'sales', (
        select jsonb_agg(jsonb_build_object(
          'purchase', coalesce(
            s.subscription || ':' || (p.price ->> 'price') || ':' || (l.line #>> '{period,start}'),
            (v_of ->> 'id') || ':' || (l.line ->> 'id')
          ),
          'products', jsonb_build_array(p.price -> 'price', p.price -> 'product'),
          'quantity', l.line -> 'quantity',
          'subscription', s.subscription,
          'starts_at', case when s.subscription is not null
            then to_timestamp((l.line #>> '{period,start}')::bigint) end,
          'ends_at', case when s.subscription is not null
            then to_timestamp((l.line #>> '{period,end}')::bigint) end,
          'is_trial', s.subscription is not null and l.line -> 'amount' = '0'
            and v_of ->> 'billing_reason' is distinct from 'subscription_cycle',
          'is_change', p.item -> 'proration' = 'true'
            or v_of ->> 'billing_reason' = 'subscription_update'
        ))
        from jsonb_array_elements(v_of #> '{lines,data}') as l (line)
        cross join lateral (
          select
            coalesce(
              nullif(l.line #> '{parent,subscription_item_details}', 'null'),
              nullif(l.line #> '{parent,invoice_item_details}', 'null'), l.line
            ) as item,
            coalesce(
              l.line #> '{pricing,price_details}', jsonb_build_object(
                'price', l.line #> '{price,id}', 'product', l.line #> '{price,product}'
              )
            ) as price
        ) as p
        cross join lateral (
          select case
            when p.item -> 'proration' = 'true' or l.line ->> 'type' = 'subscription'
              or l.line #>> '{parent,type}' = 'subscription_item_details'
              then p.item ->> 'subscription'
          end as subscription
        ) as s
        where (l.line ->> 'amount')::bigint >= 0
      )
    );
  elsif v_type = 'invoice_payment.paid' then
    return v_said || jsonb_build_object('payments', jsonb_build_array(
      v_of -> 'invoice', v_of #> '{payment,payment_intent}', v_of #> '{payment,charge}'
    ));
  elsif v_type like 'checkout.%' then
    return v_said || case
      when v_of ->> 'mode' = 'payment' and v_of ->> 'payment_status' <> 'unpaid'
        and v_of ->> 'invoice' is null then jsonb_build_object(
          'amount', v_of -> 'amount_total',
          'payments', jsonb_build_array(v_of -> 'id', v_of -> 'payment_intent'),
          'sales', jsonb_build_array(jsonb_build_object(
            'purchase', v_of -> 'id', 'quantity', 1,
            'products', jsonb_build_array(v_of #> '{metadata,product}', v_of -> 'payment_link')
          ))
        )
      else '{}'
    end;
  elsif v_type = 'charge.refunded' then
    return v_said || jsonb_build_object(
      'payments', jsonb_build_array(v_of -> 'id', v_of -> 'payment_intent', v_of -> 'invoice'),
      'taken', jsonb_build_object(
        'cause', 'refund', 'amount', v_of -> 'amount_refunded', 'paid', v_of -> 'amount'
      )
    );
  elsif v_type like 'charge.dispute.%' then
    -- No money is gone while the bank only asks (warning_…), nor once the dispute is won.
    return v_said || jsonb_build_object(
      'payments', jsonb_build_array(v_of -> 'charge', v_of -> 'payment_intent'),
      'taken', jsonb_build_object('cause', v_of -> 'id', 'amount', case
        when v_of ->> 'status' ~ '^(won|prevented|charge_refunded|warning_)' then '0'
        else v_of -> 'amount'
      end)
    );
  elsif v_of ->> 'status' = 'incomplete' then
    return v_said;
  end if;
  return v_said || jsonb_build_object('plans', (
    select jsonb_agg(jsonb_build_object(
      'subscription', v_of -> 'id',
      'products', jsonb_build_array(i.item #> '{price,id}', i.item #> '{price,product}'),
      'paid_until', case
        when v_of ->> 'status' in ('active', 'trialing') then to_timestamp(
          coalesce(i.item ->> 'current_period_end', v_of ->> 'current_period_end')::bigint
        )
        when v_of ->> 'status' = 'past_due' then to_timestamp(
          coalesce(i.item ->> 'current_period_start', v_of ->> 'current_period_start')::bigint
        )
        else coalesce(to_timestamp((v_of ->> 'ended_at')::bigint), v_at)
      end,
      'is_end', v_of ->> 'status' not in ('active', 'trialing', 'past_due')
    ))
    from jsonb_array_elements(v_of #> '{items,data}') as i (item)
  ));
end;
$$;

-- A RevenueCat event in our terms. PRODUCT_CHANGE says what is to come: the RENEWAL that follows
-- sells it. What a refund ends is told by expiration_at_ms.
create function private.read_revenuecat(p_event jsonb) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_of jsonb := coalesce(p_event -> 'event', p_event);
  v_type text := v_of ->> 'type';
  v_products jsonb := jsonb_build_array(
    v_of -> 'product_id', split_part(v_of ->> 'product_id', ':', 1)
  );
  v_subscription text := coalesce(v_of ->> 'original_transaction_id', v_of ->> 'transaction_id');
  v_ends_at timestamptz := to_timestamp((v_of ->> 'expiration_at_ms')::bigint / 1000.0);
  v_said jsonb := jsonb_build_object(
    'id', v_of -> 'id', 'type', v_type, 'is_test', v_of ->> 'environment' = 'SANDBOX',
    'happened_at', to_timestamp((v_of ->> 'event_timestamp_ms')::bigint / 1000.0)
  );
begin
  if v_type = 'TRANSFER' then
    return v_said || jsonb_build_object(
      'users', v_of -> 'transferred_to', 'moved_from', v_of -> 'transferred_from'
    );
  elsif v_type not in (
    'INITIAL_PURCHASE', 'RENEWAL', 'NON_RENEWING_PURCHASE', 'CANCELLATION', 'UNCANCELLATION',
    'EXPIRATION', 'BILLING_ISSUE', 'SUBSCRIPTION_EXTENDED', 'TEMPORARY_ENTITLEMENT_GRANT',
    'REFUND_REVERSED'
  ) then
    return v_said;
  end if;
  v_said := v_said || jsonb_build_object(
    'users', jsonb_build_array(v_of -> 'app_user_id', v_of -> 'original_app_user_id')
      || jsonb_path_query_array(v_of, '$.aliases[0 to 99]'),
    'payments', jsonb_build_array(v_of -> 'transaction_id')
  );
  if v_type in ('INITIAL_PURCHASE', 'RENEWAL', 'NON_RENEWING_PURCHASE') then
    return v_said || jsonb_build_object('sales', jsonb_build_array(jsonb_build_object(
      'purchase', case
        when v_type = 'NON_RENEWING_PURCHASE' then v_of ->> 'transaction_id'
        else concat_ws(':', v_subscription, v_of ->> 'product_id', v_of ->> 'purchased_at_ms')
      end,
      'products', v_products,
      'quantity', 1,
      'subscription', case when v_type <> 'NON_RENEWING_PURCHASE' then v_subscription end,
      'starts_at', to_timestamp((v_of ->> 'purchased_at_ms')::bigint / 1000.0),
      'ends_at', v_ends_at,
      'is_trial', v_of ->> 'period_type' = 'TRIAL' or v_of -> 'is_family_share' = 'true'
    )));
  elsif v_type = 'REFUND_REVERSED' or v_of ->> 'cancel_reason' = 'CUSTOMER_SUPPORT' then
    v_said := v_said || jsonb_build_object('taken', jsonb_build_object(
      'cause', 'refund', 'amount', (v_type <> 'REFUND_REVERSED')::integer, 'paid', 1
    ));
  else
    v_said := v_said - 'payments';
  end if;
  return v_said || case when v_ends_at is null then '{}' else jsonb_build_object(
    'plans', jsonb_build_array(jsonb_build_object(
      'subscription', coalesce(v_subscription, 'temporary:' || (v_of ->> 'app_user_id')),
      'products', v_products,
      'paid_until', greatest(
        v_ends_at, to_timestamp((v_of ->> 'grace_period_expiration_at_ms')::bigint / 1000.0)
      ),
      'is_end', v_type = 'EXPIRATION' or v_said ? 'taken'
    ))
  ) end;
end;
$$;
