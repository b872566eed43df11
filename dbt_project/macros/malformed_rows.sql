{#
  The reasons for which a row of a CSV file could not be read, as `when … then …` arms. Ingestion stores such a row as a
  message that names the fault and contains the row; a message with an identity is judged like any other. ROW_FAULTS in
  dagster_prefs/textfiles.py has the same reasons.
#}
{% macro malformed_row_reasons(identity) %}
  {%- for fault, reason in {
    "cells": "CSV row with another number of cells than its header",
    "encoding": "CSV row that is not UTF-8",
    "nul": "CSV row with the character U+0000",
    "quotes": "CSV row with a stray or unclosed quote",
    "size": "CSV row with a cell or a length beyond the limit",
  }.items() %}
    when {{ identity }} is null and j ->> 'malformed_row' = '{{ fault }}' then '{{ reason }}'
  {%- endfor %}
{%- endmacro %}
