{%- call parsed_messages(ref("raw_items")) %}
    {{- message_reasons("item_id") }}
    {{- required_reasons(["item_id"]) }}
    {{- optional_reasons() }}
{%- endcall %}
