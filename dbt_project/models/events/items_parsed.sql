{%- call parsed_messages(
  ref("raw_items"),
  {
    "item_id": "text",
    "title": "text",
    "category": "text",
    "brand": "text",
    "price": "decimal",
    "in_stock": "boolean",
  },
) %}
    when j is null then 'not valid JSON'
    when jsonb_typeof(j) <> 'object' then 'not a JSON object'
    when {{ erased("item_id") }} then 'erased'
    when item_id is null and not {{ field_given("item_id") }} then 'missing item_id'
    when item_id is null then 'bad item_id'
    when price is null and {{ field_given("price") }} then 'bad price'
    when price < 0 then 'negative price'
    when in_stock is null and {{ field_given("in_stock") }} then 'bad in_stock'
{%- endcall %}
