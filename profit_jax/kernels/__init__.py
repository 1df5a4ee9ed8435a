"""Operations in the form that each platform's compiler makes fast."""
