// Convolution as a matrix product: multiplies the terms of int8_terms.inl, chunk by chunk and panel by panel.

template <class Products>
static void conv_int8(const Int8Conv& c, Range items, Range panels) {
  const int64_t per_group = int8_panels(c.blocks_per_group);
  Products products(c);
  for (int64_t item = items.begin; item < items.end; item += c.chunk_items) {
    const Range chunk{item, item + c.chunk_items < items.end ? item + c.chunk_items : items.end};
    Strip strips[kInt8Strips];
    int64_t count = 0, prepared = -1;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t group = panel / per_group, first = panel % per_group * kInt8PanelBlocks;
      if (group != prepared) count = prepare_strips(c, chunk, group, strips);
      prepared = group;
      const int64_t block = group * c.blocks_per_group + first;
      for (int64_t i = 0; i < count; ++i)
        if (c.blocks_per_group - first >= kInt8PanelBlocks)
          products.template multiply<kInt8PanelBlocks>(strips[i], block);
        else
          products.template multiply<1>(strips[i], block);
    }
  }
}
